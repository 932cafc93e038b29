"""The LM head of a compressed model: logits only where a label needs them, and the token-normalised loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.compression.entry import Pass
from orchestrator.compression.merging import tokens_at
from orchestrator.compression.protocol import IGNORED


@dataclass
class Head:
    """Stands in for the LM head during one forward of the top model, so the model's own code around it still runs.

    Attributes:
        head: The real LM head; called as a module, so that hooks (ZeRO-3) run.
        current: The pass under way.
        columns: Original length of the rows.
        shift_labels_BN: Labels already shifted by the caller, or None.
        keep: `logits_to_keep` as the caller gave it.
        return_logits: Logits of all tokens although there are labels.
        rows_L: After the call: flat places of tokens that predict a label.
        targets_L: After the call: the labels they predict.
        cut: After the call: logits are those of `keep` only.
    """

    head: nn.Module
    current: Pass
    columns: int
    shift_labels_BN: Tensor | None = None
    keep: Any = 0
    return_logits: bool = False
    rows_L: Tensor | None = None
    targets_L: Tensor | None = None
    cut: bool = False

    def __call__(self, hidden_BMD: Tensor) -> Tensor:
        """Logits: L x vocabulary where labels ask for L of them, else B x tokens x vocabulary."""
        if self.current.labels_BN is not None or self.shift_labels_BN is not None:
            self._find_targets(hidden_BMD.device)
            assert self.rows_L is not None
            if not self.return_logits:
                return self.head(hidden_BMD.reshape(-1, hidden_BMD.shape[-1]).index_select(0, self.rows_L))
            return self.head(hidden_BMD)
        flow = self.current.flow
        if isinstance(self.keep, int) and self.keep == 0:
            return self.head(hidden_BMD)
        self.cut = True
        wanted_K = torch.arange(self.columns, device=hidden_BMD.device)
        wanted_K = wanted_K[-self.keep :] if isinstance(self.keep, int) else wanted_K[self.keep]
        if flow is None or flow.layout is None:
            return self.head(hidden_BMD[:, wanted_K])
        places_BK = _inverse(flow.origins_BN, self.columns)[:, wanted_K]
        logits_BKV = self.head(tokens_at(hidden_BMD, places_BK.clamp(min=0)))
        return logits_BKV.masked_fill((places_BK < 0).unsqueeze(-1), float("nan"))

    def _find_targets(self, device: torch.device) -> None:
        flow = self.current.flow
        if flow is not None and flow.labels_BN is not None and flow.layout is not None:
            targets_BM = F.pad(flow.labels_BN[:, 1:], (0, 1), value=IGNORED)
            # Padding predicts nothing (with padding on the left it stands before a row's first token).
            targets_BM = targets_BM.masked_fill(~flow.layout.real_BN, IGNORED)
        elif self.shift_labels_BN is not None:
            targets_BM = self.shift_labels_BN
        else:
            assert self.current.labels_BN is not None
            targets_BM = F.pad(self.current.labels_BN[:, 1:], (0, 1), value=IGNORED)
        flat = targets_BM.reshape(-1)
        rows_L = (flat != IGNORED).nonzero().squeeze(1)
        self.rows_L = rows_L.to(device, non_blocking=True)
        self.targets_L = flat[rows_L].to(device, non_blocking=True)

    def loss(self, logits: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Sum over label tokens of the cross-entropy (float32), divided by their number or the number given.

        A batch without labels gives 0 with a graph.
        """
        assert self.rows_L is not None and self.targets_L is not None
        if self.return_logits:
            logits = logits.reshape(-1, logits.shape[-1]).index_select(0, self.rows_L)
        total = F.cross_entropy(logits.float(), self.targets_L.to(logits.device), reduction="sum")
        if num_items_in_batch is None:
            return total / max(1, len(self.targets_L))
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    def at_original_length(self, logits_BMV: Tensor) -> Tensor:
        """All logits at the length of the input, NaN where a token was dropped."""
        flow = self.current.flow
        if self.cut or flow is None or flow.layout is None:
            return logits_BMV
        rows, _, vocabulary = logits_BMV.shape
        full = logits_BMV.new_full((rows, self.columns + 1, vocabulary), float("nan"))
        # Padding goes to a column of its own that is cut off again.
        places_BM = torch.where(flow.origins_BN < 0, self.columns, flow.origins_BN)
        full.scatter_(1, places_BM.unsqueeze(-1).expand(-1, -1, vocabulary), logits_BMV)
        return full[:, : self.columns]


def _inverse(origins_BM: Tensor, columns: int) -> Tensor:
    """Place of each original column among the kept tokens, -1 where it was dropped."""
    rows, count = origins_BM.shape
    places_BN = origins_BM.new_full((rows, columns + 1), -1)
    targets_BM = torch.where(origins_BM < 0, columns, origins_BM)
    places_BN.scatter_(1, targets_BM, torch.arange(count, device=origins_BM.device).expand(rows, -1).contiguous())
    return places_BN[:, :columns]
