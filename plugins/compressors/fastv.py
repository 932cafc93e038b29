"""`fastv`: keeps the visual tokens that the query tokens attend to most (FastV, arXiv:2403.06764, section 4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator import plugin

if TYPE_CHECKING:
    from torch import Tensor


class FastVSpec(plugin.CompressorSpec):
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

    def compress(self, visual_BND: Tensor, grid: plugin.Grid, context: plugin.Context) -> plugin.Kept:
        """See `plugin.Compressor`; kept tokens keep their order and position ids.

        Raises:
            ValueError: more tokens are asked for than there are, or the context brings no attention.
        """
        if context.attention_BN is None:
            raise ValueError("the attention of the layer before it is not known here")
        return plugin.take(visual_BND, plugin.top_tokens(context.attention_BN, self.spec.kept_tokens(grid)), context)
