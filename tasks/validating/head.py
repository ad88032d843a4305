"""The MTP head in torch. It drafts at all places of a true text at once, or step by step as in an engine."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import CheckpointError
from requant.tasks.validating.model import Skeleton, state_dict


class MtpHead(nn.Module):
    """A Qwen3.5/3.6 head. It drafts token x[t+2] from the main model's hidden[t] and x[t+1].

    It computes `fc(cat[norm_e(embed(x[t+1])), norm_h(hidden[t])])`, a full-attention decoder layer at position t,
    `mtp.norm`, and the main model's output layer. Each further draft takes the head's own output as hidden state and
    its own draft as token, one position further. The decoder layer is transformers' own, in a text model of one layer.
    Of a head with several layers only the first is run, so it makes one draft. Source: vLLM 0.32,
    model_executor/models/qwen3_5_mtp.py and v1/spec_decode/eagle.py.
    """

    def __init__(self, checkpoint: Checkpoint, main: Skeleton) -> None:
        """Load the head. The ends of `main` must be loaded. Raises CheckpointError for a layout that cannot be run."""
        super().__init__()
        head = checkpoint.head
        if head is None or head.layout != "mtp":
            raise CheckpointError(f"the MTP head of {checkpoint.folder} has no layout that can be run here")
        self.main = [main]  # in a list, so that torch does not take it for a submodule
        self.config = copy.deepcopy(main.text.config)
        self.config.num_hidden_layers = 1
        self.config.layer_types = ["full_attention"]
        self.config.vocab_size, self.config.pad_token_id = 1, None
        state = state_dict((checkpoint.tensors[n] for n in head.names), checkpoint.config, main.dtype)
        state = {name.partition("mtp.")[2]: value for name, value in state.items()}
        norm: Callable[..., nn.Module] = type(main.text.norm)
        hidden = self.config.hidden_size
        self.norm_embedding = norm(hidden, eps=self.config.rms_norm_eps)
        self.norm_hidden = norm(hidden, eps=self.config.rms_norm_eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        try:
            self.norm_embedding.load_state_dict({"weight": state.pop("pre_fc_norm_embedding.weight")})
            self.norm_hidden.load_state_dict({"weight": state.pop("pre_fc_norm_hidden.weight")})
            self.fc.load_state_dict({"weight": state.pop("fc.weight")})
        except KeyError as error:
            raise CheckpointError(f"the MTP head of {checkpoint.folder} lacks {error}") from error
        own = {k: v for k, v in state.items() if not k.startswith("layers.") or k.startswith("layers.0.")}
        self.recycles = len(own) == len(state)  # whether one layer makes all drafts
        own["embed_tokens.weight"] = torch.zeros(1, hidden, dtype=main.dtype)
        self.layer = type(main.text).from_pretrained(None, config=self.config, state_dict=own, dtype=main.dtype)
        self.to(device=main.device, dtype=main.dtype).eval()

    def cache(self) -> DynamicCache:
        """Return an empty cache for the layer."""
        return DynamicCache(config=self.config)

    def forward(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Run the head: tokens and positions int64 `[1, n]`, hidden `[1, n, hidden]` -> hidden states `[1, n, hidden]`.

        The main model's output layer turns the result into drafts. `mask`, `[1, 1, n, n]`, is added to the attention's
        scores; without it each row sees itself, the rows before it, and those in the `cache`.
        """
        embedded = self.main[0].text.get_input_embeddings()(tokens)
        mixed = self.fc(torch.cat([self.norm_embedding(embedded), self.norm_hidden(hidden)], dim=-1))
        output = self.layer(
            inputs_embeds=mixed,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        drafted: torch.Tensor = output.last_hidden_state
        return drafted

    def drafts(self, tokens: torch.Tensor, hidden: torch.Tensor, depth: int) -> torch.Tensor:
        """Draft at each place of a true text: tokens int64 `[n]`, hidden states of the main model `[n, hidden]`.

        Returns int64 `[depth, n-1]`, or `[1, n-1]` for a head that makes one draft. Entry k, t is the draft for token
        t + 2 + k, after the text up to t + 1 and the k drafts before. All places are run at once: the rows of a later
        draft see the first drafts' rows up to their own place, and the earlier drafts of that place.
        """
        rows = len(tokens) - 1
        place = torch.arange(rows, device=tokens.device)
        causal, own = place[:, None] >= place[None], place[:, None] == place[None]
        fed, states, positions = tokens[1:], hidden[:-1], place
        drafts: list[torch.Tensor] = []
        for step in range(depth if self.recycles else 1):
            output = self(fed[None], states[None], positions[None], mask=self._mask(causal, own, step + 1))[0, -rows:]
            drafts.append(self.main[0].logits(output).argmax(-1))
            fed, states = torch.cat([fed, drafts[-1]]), torch.cat([states, output])
            positions = torch.cat([positions, place + step + 1])
        return torch.stack(drafts)

    def _mask(self, causal: torch.Tensor, own: torch.Tensor, steps: int) -> torch.Tensor:
        """Build the mask: rows of step k see the rows of step 0 up to their place, and their place in steps 1 to k.

        `causal` and `own` are bool `[rows, rows]`; the result is `[1, 1, steps * rows, steps * rows]`.
        """
        nothing = torch.zeros_like(own)
        lines = [
            torch.cat([causal, *(own if 1 <= k <= step else nothing for k in range(1, steps))], dim=1)
            for step in range(steps)
        ]
        visible = torch.cat(lines)
        lowest = torch.finfo(self.fc.weight.dtype).min
        return torch.zeros_like(visible, dtype=self.fc.weight.dtype).masked_fill(~visible, lowest)[None, None]
