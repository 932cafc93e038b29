"""`fastv`: keeps the visual tokens that the query tokens attend to most (FastV, arXiv:2403.06764, section 4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.spec.components import CompressorSpec, Grid

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.compression.protocol import Context, Kept


class FastVSpec(CompressorSpec):
    """Ranks visual tokens by the attention they get in layer K-1, mean over heads, and keeps the first.

    As published the score comes from layer K-1 and the last token of the prompt; that one row is computed anew beside
    the model's attention, so every attention implementation serves and no layer makes a full map. In training the query
    is the token before an answer, averaged over a sample's answers. Kept tokens keep order and position ids. Paper:
    layer 2, keep_ratio 1/2.
    """

    implementation: ClassVar[str] = "orchestrator_plugins.compressors.fastv:FastV"
    needs: ClassVar[tuple[str, ...]] = ("queries",)

    kind: Literal["fastv"] = "fastv"


class FastV:
    """Top tokens by attention; of equal ones the first."""

    def __init__(self, spec: FastVSpec) -> None:
        self.spec = spec

    def compress(self, visual_BND: Tensor, grid: Grid, context: Context) -> Kept:
        """See `orchestrator.compression.protocol.Compressor`; kept tokens keep their order and position ids.

        Raises:
            ValueError: more tokens are asked for than there are, or the context brings no attention.
        """
        from orchestrator.compression.protocol import take, top_tokens

        if context.attention_BN is None:
            raise ValueError("the attention of the layer before it is not known here")
        return take(visual_BND, top_tokens(context.attention_BN, self.spec.kept_tokens(grid)), context)
