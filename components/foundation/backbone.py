"""One causal language model, many roles.

The base weights are loaded once and never change. Each role (actor, reward model, cost model, the two
critics) is a LoRA adapter on them, plus a linear head where the role scores text; the reference policy is
the base with every adapter switched off. Six roles then cost little more memory than one model.
With full fine-tuning a role is a copy of the whole model instead, with weights of its own.

Shapes: B sequences, L tokens (prompt left-padded, answer right-padded), T answer tokens, D hidden size.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.foundation import distributed
from components.foundation.activation_checkpointing import computed_again_in_backward
from components.foundation.architecture import has_transposed_maps, layers_of, linear_names
from components.foundation.errors import IntegrityError, ModelError
from components.foundation.language_model import (
    check_vocabulary,
    choose_dtype,
    import_transformers,
    load_causal_lm,
    load_tokenizer,
    save_causal_lm,
    vocabulary,
)
from components.foundation.setting_sections import LoraSettings
from components.foundation.shared_prompt import branch_attention, branch_positions, respects_branches
from components.foundation.tensor_file import read_tensors
from components.foundation.trunk import FrozenTrunk
from components.foundation.untrusted import parse_json, read_text, shown

log = logging.getLogger("saferlhf")

REFERENCE = "reference"
"""Name of the role that uses the base weights alone, unless an adapter was loaded under that name."""

_SHORT = 128
"""Tokens up to which plain attention beats torch's fused one in bfloat16 on a CPU: at 60, six sequences take 0.7 and
1.4 ms forwards and backwards against 1.0 and 5.1. It holds [B, heads, L, L] weights, so longer ones stay fused."""

_LOOK_BACK = ("sliding_window", "attention_chunk_size", "index_block_size")
"""Settings of an architecture that limit what its tokens see, as a number of tokens."""

_WEIGHTS = {False: "adapter.safetensors", True: "weights.safetensors"}
"""File of a role's weights, by whether it is a full copy."""


class Backbone:
    """The base model with its adapters and heads.

    Attributes:
        tokenizer: shared by all roles.
        device: where the weights are.
        checkpoints_activations: whether layers are computed again in the backward pass, to save memory.
    """

    def __init__(self, model: Any, tokenizer: Any, *, checkpoints_activations: bool = False) -> None:
        vocabulary = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > vocabulary:
            raise ModelError(f"the tokenizer has {len(tokenizer)} tokens but the model embeds only {vocabulary}")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._model = model
        name, self._layers = layers_of(model)
        self._linear_names = [linear_names(layer, f"{name}.{i}") for i, layer in enumerate(self._layers)]
        self._fan_in_fan_out = has_transposed_maps(model)
        self._peft: Any = None
        self._adapted: list[Any] = []
        self._heads = nn.ModuleDict()
        self._reads_prompt: set[str] = set()
        self._lora: dict[str, LoraSettings] = {}
        self._copies: dict[str, Any] = {}
        self._current: tuple[str, bool] | None = None
        self._respects_branches: bool | None = None
        self.tokenizer = tokenizer
        self.checkpoints_activations = checkpoints_activations
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.eos_token_id: int = tokenizer.eos_token_id
        self._has_two_attentions = (
            self.dtype == torch.bfloat16
            and self.device.type == "cpu"
            and model.config._attn_implementation == "sdpa"
            and model._can_set_attn_implementation()
        )

    @classmethod
    def load(cls, folder: Path, dtype: str, seed: int, *, checkpoints_activations: bool = False) -> Backbone:
        """Load a model folder; `dtype` is auto, bfloat16 or float32, `seed` fixes the first weights of new roles."""
        torch.manual_seed(seed)
        model = load_causal_lm(folder, choose_dtype(dtype))
        return cls(model, load_tokenizer(folder), checkpoints_activations=checkpoints_activations)

    @property
    def hidden_size(self) -> int:
        return int(self._model.config.hidden_size)

    @property
    def vocabulary_size(self) -> int:
        return int(self._model.get_input_embeddings().num_embeddings)

    def lora_rank(self, role: str) -> int:
        return self._lora[role].rank

    def add_role(self, role: str, lora: LoraSettings | None, *, scored: bool, reads_prompt: bool = False) -> None:
        """New adapter, initialised to change nothing; `scored` adds a linear head (fp32, zero bias).

        With `reads_prompt` an answer's score is the soft minimum of the head's outputs at its own last token and at the
        prompt's (`batching.answer_score`).
        Without `lora`, the role is a full copy of the base in fp32 (of its decoder, if scored).
        """
        if lora is None:
            copied = copy.deepcopy(self._model.get_decoder() if scored else self._model)
            self._copies[role] = copied.float().requires_grad_(True)
        else:
            self._add_adapter(role, lora)
        if scored:
            head = nn.Linear(self.hidden_size, 1, dtype=torch.float32)  # drawn on the CPU, the same on every device
            nn.init.zeros_(head.bias)
            nn.init.normal_(head.weight, std=1.0 / self.hidden_size)
            self._heads[role] = head.to(self.device)
        if reads_prompt:
            self._reads_prompt.add(role)

    def reads_prompt(self, role: str) -> bool:
        """Whether the scores of `role` are also read at the prompt's last token (`add_role`)."""
        return role in self._reads_prompt

    def _add_adapter(self, role: str, lora: LoraSettings) -> None:
        import_transformers()
        from peft import LoraConfig, PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            target_modules=[name for names in self._linear_names[self._first_adapted(lora) :] for name in names],
            fan_in_fan_out=self._fan_in_fan_out,
            task_type="CAUSAL_LM",
        )
        if self._peft is None:
            self._peft = PeftModel(self._model, config, adapter_name=role)
        else:
            self._peft.add_adapter(role, config)
        self._adapted = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
        for module in self._adapted:
            module.cast_input_dtype_enabled = False  # `_mixed_precision` does it, the other way round
        self._lora[role] = lora

    def add_head(self, role: str, scored_role: str) -> None:
        """New role without an adapter: a copy of the head of `scored_role`, to read that role's hidden states."""
        self._heads[role] = copy.deepcopy(self._heads[scored_role])

    def text(self, answer: Sequence[int]) -> str:
        """Answer ids -> text, without special tokens and control characters."""
        decoded = self.tokenizer.decode(list(answer), skip_special_tokens=True)
        return "".join(c for c in decoded if c.isprintable() or c == "\n").strip()

    def has_adapter(self, role: str) -> bool:
        """Whether the role has weights of its own below its head: an adapter, or a full copy."""
        return role in self._lora or role in self._copies

    def is_full_copy(self, role: str) -> bool:
        return role in self._copies

    def trainable_parameters(self, role: str) -> list[nn.Parameter]:
        """Parameters of a role, in a stable order."""
        return list(self.role_tensors(role).values())

    def role_tensors(self, role: str) -> dict[str, nn.Parameter]:
        """Live parameters of a role and its head, under names that do not hold the role's name."""
        if role in self._copies:
            tensors = dict(self._copies[role].named_parameters())
        else:
            tensors = {
                name.replace(f".{role}.", "."): parameter
                for name, parameter in (self._peft.named_parameters() if self._peft is not None else ())
                if ".lora_" in name and f".{role}." in name
            }
        if role in self._heads:
            tensors |= {f"head.{name}": parameter for name, parameter in self._heads[role].named_parameters()}
        return tensors

    def role_shapes(self, role: str) -> dict[str, torch.Size]:
        """Shapes of `role_tensors`, in its order, of the whole tensors also where they are partitioned."""
        return {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in self.role_tensors(role).items()}

    def trained_module(self, role: str) -> nn.Module:
        """All that a full copy is made of, as one module."""
        return nn.ModuleList([self._copies[role], *([self._heads[role]] if role in self._heads else [])])

    def partition_frozen(self, trained: Collection[str]) -> list[Any]:
        """Partition by ZeRO-3 what no role of `trained` changes: the base, and the other roles' full copies.

        Adapters and heads are small, and stay whole on every rank.
        """
        from components.foundation.zero import partition_frozen

        frozen = [module for role, module in self._copies.items() if role not in trained]
        for module in frozen:
            module.requires_grad_(False)
        with self._adapters_hidden():
            offloads = [partition_frozen(module) for module in (self._model, *frozen)]
        self.device = distributed.device()
        for module in (self._model, self._heads, *frozen):  # what is not partitioned: adapters, heads, buffers
            module.to(self.device)
        return offloads

    @contextmanager
    def _adapters_hidden(self) -> Iterator[None]:
        """Within the block the base is the modules that it was before any adapter wrapped them."""
        hidden = [(module, dict(module.named_children())) for module in self._adapted]
        for module, children in hidden:
            for name in children.keys() - {"base_layer"}:
                del module._modules[name]
        try:
            yield
        finally:
            for module, children in hidden:
                module._modules.update(children)

    @contextmanager
    def prepared(self, role: str) -> Iterator[None]:
        """Within the block a role's weights are as its passes without gradients take them, not made so in each pass.

        Where weights are partitioned (ZeRO-3), every rank holds all of them, so that no pass needs the others: all
        ranks must enter. In a bfloat16 model the adapter, which is kept in fp32, is rounded once.
        """
        adapter = [tensor for name, tensor in self.role_tensors(role).items() if ".lora_" in name]
        kept = [tensor.data for tensor in adapter]
        with self._gathered(role):
            try:
                for tensor in adapter:
                    tensor.data = tensor.data.to(self.dtype)
                yield
            finally:
                for tensor, data in zip(adapter, kept, strict=True):
                    tensor.data = data

    def _gathered(self, role: str) -> AbstractContextManager[None]:
        if distributed.world().zero_stage < 3:
            return nullcontext()
        from components.foundation.zero import whole

        return whole(self._copies.get(role, self._model).parameters())

    @contextmanager
    def role(self, role: str, *, train: bool = False) -> Iterator[None]:
        """Within the block the model answers as `role`; gradients flow only when `train`. Blocks may be nested."""
        outer = self._current
        self._activate(role, train)
        try:
            with torch.set_grad_enabled(train):
                yield
        finally:
            if outer is not None:
                self._activate(*outer)
            self._current = outer

    def _activate(self, role: str, train: bool) -> None:
        self._current = (role, train)
        if not self.has_adapter(role) and role not in self._heads and role != REFERENCE:
            raise KeyError(role)
        active = [role] if role in self._lora else []
        for layer in self._adapted:
            layer.set_adapter(active, inference_mode=not train)
        if role in self._heads:
            self._heads[role].requires_grad_(train)

    def trunk_states(self, input_ids: Tensor, attention_mask: Tensor, branches: Tensor | None = None) -> Tensor | None:
        """[B, L] ids and mask -> [B, L, D] output of the layers below every adapter, for `trunk=` of the methods below.

        None where some role adapts the first layer: then nothing is shared. `branches` as in `hidden_states`.
        """
        trunk = self._trunk()
        if trunk is None:
            return None
        kept: list[Tensor] = []
        with torch.no_grad(), trunk.recording(kept.append):
            self._forward(self._decoder(), input_ids, attention_mask, branches)
        return kept[0]

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        trunk: Tensor | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """[B, L] ids and mask -> [B, L, D] last hidden states of the current role.

        With `branches`, [B, L], a row holds two answers to its prompt, and neither sees the other (`PairBatch`); only
        where `shares_prompts`.
        """
        with self._on_trunk(trunk):
            states: Tensor = self._forward(self._decoder(), input_ids, attention_mask, branches).last_hidden_state
        return states

    def scores(
        self,
        role: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        trunk: Tensor | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """[B, L] -> [B, L] head outputs of `role` at every token, in fp32. Call within `role(...)`."""
        return self.head_outputs(role, self.hidden_states(input_ids, attention_mask, trunk, branches))

    def shares_prompts(self, length: int) -> bool:
        """Whether rows of `length` tokens may hold two answers to one prompt (`branches` of `hidden_states`).

        No architecture is assumed, so this is found out by trying, once: a model may make its own mask or positions
        (ALiBi, recurrent layers). Rows that are longer than a model looks back in some layer are not shared. All ranks
        call, and what the first one finds counts.
        """
        if self._respects_branches is None:
            with self.role(REFERENCE):
                respects = respects_branches(self.hidden_states, self.dtype, self.device)
            self._respects_branches = distributed.from_main(lambda: respects)
            if not respects:
                log.info("this model would not keep two answers to one prompt apart: each has a row of its own")
        config = self._model.config.get_text_config()
        windows = (getattr(config, name, None) for name in _LOOK_BACK)
        return self._respects_branches and all(length <= window for window in windows if window)

    def head_outputs(self, role: str, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [...] outputs of the head of `role`, in fp32."""
        head: nn.Linear = self._heads[role]  # type: ignore[assignment]
        outputs: Tensor = head(hidden_states.float()).squeeze(-1)
        return outputs

    def answer_logits(
        self, input_ids: Tensor, attention_mask: Tensor, answer_length: int, trunk: Tensor | None = None
    ) -> Tensor:
        """[B, L] -> [B, T, V] logits that predict the last T = `answer_length` tokens of each row."""
        length = input_ids.shape[1]
        keep = torch.arange(length - answer_length - 1, length - 1, device=input_ids.device)
        with self._on_trunk(trunk):
            logits: Tensor = self._forward(
                self._language_model(), input_ids, attention_mask, logits_to_keep=keep
            ).logits
        return logits

    def decode_step(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """[B, L'] new tokens with a key-value cache -> [B, V] logits for the next token."""
        # an index, not a count: a slice of the hidden states is not contiguous, and the product with the vocabulary
        # would then copy its matrix once a row
        last = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
        model = self._language_model()
        self._choose_attention(model, attention_mask)
        with self._mixed_precision():
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    def save_role(self, role: str, folder: Path) -> None:
        """Write a role's adapter (or full copy) and head as safetensors. All ranks call, rank 0 writes."""
        from safetensors.torch import save_file

        tensors = self.role_state(role)
        if not distributed.world().is_main:
            return
        lora = self._lora.get(role)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / _WEIGHTS[lora is None])
        description = {
            "lora": None if lora is None else lora.model_dump(),
            "scored": role in self._heads,
            "reads_prompt": self.reads_prompt(role),
            "vocabulary": vocabulary(self.tokenizer),
        }
        (folder / "adapter.json").write_text(json.dumps(description) + "\n")

    def role_state(self, role: str) -> dict[str, Tensor]:
        """A role's parameters, whole and in main memory, on rank 0; empty on the others, which must call it too."""
        state = {}
        for name, parameter in self.role_tensors(role).items():
            with _whole_parameter(parameter):
                if distributed.world().is_main:
                    state[name] = parameter.detach().cpu().clone().contiguous()
        return state

    def set_role_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Give a role parameters such as `role_state` returns. All ranks call it, and rank 0's state counts.

        No optimiser step may follow: with ZeRO an optimiser has copies of its own.
        """
        for name, parameter in self.role_tensors(role).items():
            with _whole_parameter(parameter, changed=True), torch.no_grad():
                if distributed.world().is_main:
                    parameter.copy_(state[name])
                distributed.copy_from_main(parameter)

    def load_role(self, role: str, folder: Path) -> None:
        """Add `role` with the adapter (or full copy) and head that `save_role` wrote (under whatever role name).

        Raises:
            ModelError: files are missing or damaged, or fit another model.
        """
        try:
            description = parse_json(read_text(folder / "adapter.json"))
            lora = None if description["lora"] is None else LoraSettings.model_validate(description["lora"])
            scored = bool(description["scored"])
            reads_prompt = description.get("reads_prompt", False)  # older ones do not say
            if not isinstance(reads_prompt, bool):
                raise TypeError("neither true nor false")
            stored = read_tensors(folder / _WEIGHTS[lora is None], self.device)
            trained_with = description.get("vocabulary")  # older ones do not say
            if trained_with is not None:
                trained_with = {
                    "tokens": int(trained_with["tokens"]),
                    "sha256": shown(trained_with["sha256"]).strip("'"),
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IntegrityError) as error:
            raise ModelError(
                f"adapter {folder} cannot be read ({type(error).__name__}): it needs adapter.json and "
                "adapter.safetensors (after full fine-tuning: weights.safetensors), both whole"
            ) from error
        if trained_with is not None:
            check_vocabulary(trained_with, self.tokenizer, f"adapter {folder}")
        ranks = {len(tensor) for name, tensor in stored.items() if ".lora_A." in name and tensor.dim()}
        if lora is not None and ranks != {lora.rank}:  # before so much memory is taken
            raise ModelError(f"adapter {folder} says that it is of rank {lora.rank}, and its tensors are of {ranks}")
        self.add_role(role, lora, scored=scored, reads_prompt=reads_prompt)
        own = self.role_tensors(role)
        if _shapes(stored) != _shapes(own):
            raise ModelError(
                f"adapter {folder} was made for another model: its tensors do not fit the layers of this one"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored[name])

    def merge_role(self, role: str) -> None:
        """Fold a role's adapter into the base weights (in fp32), or put its copy there; drop every other role."""
        if role in self._copies:
            self._model = self._copies[role]
        else:
            self._peft.base_model.set_adapter(role)
            self._model.float()
            self._model = self._peft.merge_and_unload(adapter_names=[role])
        self._copies = {}
        self._peft = None
        self._adapted = []
        self._heads = nn.ModuleDict()
        self._reads_prompt = set()
        self._lora = {}

    def export(self, folder: Path) -> None:
        """Write the base weights (after `merge_role`: the merged policy) as a plain Hugging Face folder."""
        save_causal_lm(self._model, self.tokenizer, folder, self.dtype)

    def export_adapter(self, role: str, folder: Path, base: str = "") -> None:
        """Write a role's adapter in PEFT's format, for other programs that hold the base weights.

        All ranks call, rank 0 writes. `base` is where the base weights are; PEFT's description names it.
        """
        from safetensors.torch import save_file

        adapter = {name: t for name, t in self.role_state(role).items() if not name.startswith("head.")}
        if not distributed.world().is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(self._peft.peft_config[role])
        config.base_model_name_or_path = base or None  # else a folder of this machine
        config.target_modules = sorted(config.target_modules)  # a set is written in another order each time
        config.save_pretrained(folder)

    def export_merged(self, role: str, folder: Path) -> None:
        """Write what `merge_role` and `export` would, and leave base and adapters as they are."""
        if role in self._copies:
            save_causal_lm(self._copies[role], self.tokenizer, folder, self.dtype)
            return
        folded = {f"{name}.weight": m for name, m in self._model.named_modules() if role in getattr(m, "lora_A", ())}
        weights = {}
        for name, tensor in self._model.state_dict().items():
            plain = name.replace(".base_layer.", ".")
            if ".lora_" not in name:
                weights[plain] = tensor.float() + folded[plain].get_delta_weight(role) if plain in folded else tensor
        save_causal_lm(self._model, self.tokenizer, folder, self.dtype, weights)

    def _language_model(self) -> Any:
        """The whole model that the current role answers with."""
        return self._copies.get(self._current[0], self._model) if self._current else self._model

    def _decoder(self) -> Any:
        """The model that the current role computes hidden states with; a scored role's copy is a decoder alone."""
        model = self._language_model()
        return (
            model
            if self._current and model is not self._model and self._current[0] in self._heads
            else model.get_decoder()
        )

    def _forward(
        self,
        module: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        branches: Tensor | None = None,
        **more: Any,
    ) -> Any:
        self._choose_attention(module, attention_mask)
        mask, positions = attention_mask, position_ids(attention_mask)
        if branches is not None:
            mask = branch_attention(attention_mask, branches, self.dtype)
            positions = branch_positions(attention_mask, branches)
        with self._mixed_precision(), self._computed_again(module):
            return module(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                **more,
            )

    def _choose_attention(self, module: Any, attention_mask: Tensor) -> None:
        """Before every pass and by its length alone: what came before must not change a bit of it."""
        wanted = "eager" if attention_mask.shape[1] <= _SHORT else "sdpa"
        if self._has_two_attentions and module.config._attn_implementation != wanted:
            module.set_attn_implementation(wanted)

    def _mixed_precision(self) -> AbstractContextManager[None]:
        """Adapters are kept in fp32, for their optimiser; within a bfloat16 model they multiply in bfloat16."""
        half = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if half else nullcontext()

    def _computed_again(self, module: Any) -> AbstractContextManager[None]:
        if not (self.checkpoints_activations and torch.is_grad_enabled()):
            return nullcontext()
        return computed_again_in_backward(layers_of(module)[1])

    def _trunk(self) -> FrozenTrunk | None:
        depth = 0 if self._copies else min((self._first_adapted(lora) for lora in self._lora.values()), default=0)
        return FrozenTrunk(self._layers, depth) if depth else None

    @contextmanager
    def _on_trunk(self, states: Tensor | None) -> Iterator[None]:
        trunk = self._trunk() if states is not None else None
        if trunk is None or states is None:
            yield
        else:
            with trunk.replaced(states):
                yield

    def _first_adapted(self, lora: LoraSettings) -> int:
        """Index of the lowest layer that an adapter with these settings changes."""
        return max(0, len(self._layers) - lora.top_layers) if lora.top_layers else 0


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, L] mask -> [B, L] positions that count real tokens only, so that padding never shifts a score."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _whole_parameter(parameter: nn.Parameter, *, changed: bool = False) -> AbstractContextManager[None]:
    if distributed.world().zero_stage < 3:
        return nullcontext()
    from components.foundation.zero import whole

    return whole([parameter], changed=changed)
