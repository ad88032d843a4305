"""The MTP head in torch. It drafts at all places of a true text at once, or step by step as in an engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import CheckpointError
from requant.tasks.validating.head_layouts import LAYOUTS, can_be_run, config_of_layer, layers_of, name_in_model
from requant.tasks.validating.model import Skeleton, empty_model, fill, loading_of, state_dict


class MtpHead(nn.Module):
    """A head of Qwen, DeepSeek or GLM. It drafts token x[t+2] from the main model's hidden[t] and x[t+1].

    It computes `fusion(cat[norm(embed(x[t+1])), norm(hidden[t])])` with a norm for each, a decoder layer at position t,
    a norm, and the main model's output layer; hidden[t] is the main model's after its final norm. Each further draft
    takes the head's own output, after its norm, as hidden state and its own draft as token, one position further. The
    decoder layer and the norm are transformers' own, in a text model of one layer.

    Of a head with several layers only the first is run, so it makes one draft: vLLM then runs one layer after the other
    or the first again, depending on which of its model runners is used, and SGLang refuses several layers.

    Sources: vLLM 0.32.0, model_executor/models/{qwen3_5,deepseek,glm4_moe,glm4_moe_lite}_mtp.py,
    models/deepseek_v32/nvidia/mtp.py and v1/spec_decode/llm_base_proposer.py; SGLang 0.5.23,
    srt/models/{deepseek,glm4_moe,glm4_moe_lite}_nextn.py. They differ in two points. vLLM alone puts zeros in place of
    an inlined head's embedding at position 0, which is done here. For a further draft of GLM-4, vLLM takes the output
    before its norm; SGLang, and vLLM for DeepSeek, take it after the norm, as it is done here.
    """

    def __init__(self, checkpoint: Checkpoint, main: Skeleton) -> None:
        """Load the head. The ends of `main` must be loaded.

        Raises CheckpointError for a head that cannot be run, and for one that lacks weights or has others than its
        config says.
        """
        super().__init__()
        head, source = checkpoint.head, f"the MTP head of {checkpoint.folder}"
        if head is None or not can_be_run(checkpoint):
            raise CheckpointError(f"{source} has no layout that can be run in torch")
        self.main = [main]  # in a list, so that torch does not take it for a submodule
        self.layout = LAYOUTS[head.layout]
        first, *later = layers_of(head) or [0]
        self.recycles = not later  # whether one layer makes all drafts
        self.config = config_of_layer(main.text.config, head)
        self.model = empty_model(type(main.text), self.config, main.settings)
        for name, module in zip(self.layout.before, self._modules_before(type(main.text.norm)), strict=True):
            self.model.add_module(name, module.to(main.dtype))
        read = (checkpoint.tensors[name] for name in head.names if name_in_model(name, self.layout, first))
        weights = state_dict(read, checkpoint, main.settings)
        state = {own: weights[name] for name in weights if (own := name_in_model(name, self.layout, first))}
        state["embed_tokens.weight"] = torch.zeros(1, self.config.hidden_size)  # never looked up
        if missing := fill(self.model, state, loading_of(self.model, main.settings), source):
            raise CheckpointError(f"{source} lacks {self.layout.stated(min(missing))!r}")

    def _modules_before(self, norm: Callable[..., nn.Module]) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Make the modules `before` the decoder layer, without weights."""
        hidden, eps = self.config.hidden_size, self.config.rms_norm_eps
        with torch.device("meta"):
            return norm(hidden, eps=eps), norm(hidden, eps=eps), nn.Linear(2 * hidden, hidden, bias=False)

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

        The main model's output layer turns the result into drafts. `mask`, `[1, 1, n, rows in the cache + n]`, is added
        to the attention's scores; without it each row sees itself, the rows before it, and those in the `cache`.
        """
        embedded = self.main[0].text.get_input_embeddings()(tokens)
        if self.layout.masks_first:
            embedded = embedded.masked_fill((positions == 0)[..., None], 0)
        embedding_norm, hidden_norm, fusion = map(self.model.get_submodule, self.layout.before)
        mixed = fusion(torch.cat([embedding_norm(embedded), hidden_norm(hidden)], dim=-1))
        output = self.model(
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
        fed, states, cache = tokens[1:], hidden[:-1], self.cache()
        drafts: list[torch.Tensor] = []
        for step in range(depth if self.recycles else 1):
            mask = self._mask(torch.cat([causal, *[own] * step], dim=1))
            states = self(fed[None], states[None], place[None] + step, mask=mask, cache=cache)[0]
            fed = self.main[0].logits(states).argmax(-1)
            drafts.append(fed)
        return torch.stack(drafts)

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Return what is added to the attention's scores: bool `[rows, keys]` -> `[1, 1, rows, keys]`."""
        dtype = self.main[0].dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[None, None]
