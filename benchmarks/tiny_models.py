"""Build any language model of Transformers small, from its default configuration.

In every part of a configuration, fields are recognised as sizes by their names, and large defaults are replaced by
small values. Fields that this does not get right, such as sizes that must fit each other, are in `SPECIAL`.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

V, D, LAYERS, HEADS, HEAD_DIM, LENGTH, ROWS = 128, 64, 2, 4, 16, 12, 2

#: Patterns of field names, and the values that replace larger defaults; the first matching pattern counts.
_SIZES: list[tuple[str, int]] = [
    (r"(^|_)vocab_size$|^vocab$|vocabulary_size$|^n_vocab$", V),
    (r"codebook_size$|^num_codebook_vectors$", 32),
    (r"num_key_value_heads$|num_kv_heads$|n_kv_heads$|multi_query_group_num$|num_query_groups$", 2),
    (r"^mamba_n_heads$|^mamba_num_heads$", 8),
    (r"^rotary_dim$", 8),
    (r"q_lora_rank$|kv_lora_rank$|lora_rank$|time_decay_extra_dim$", 16),
    (r"qk_rope_head_dim$", 8),
    (r"qk_nope_head_dim$|v_head_dim$|global_head_dim$|linear_key_head_dim$|linear_value_head_dim$", HEAD_DIM),
    (r"(^|_)(attention_)?head_dim$|^d_kv$|kv_channels$|attention_head_size$|head_size$|mamba_head_dim$|mamba_d_head$",
     HEAD_DIM),
    (r"num_experts_per_tok$|moe_top_k$|top_k_experts$|moe_topk$|moe_k$|^experts_per_token$|num_selected_experts$", 2),
    (r"^(n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|mamba_ngroups|ngroups)$", 1),
    (r"n_shared_experts$|num_shared_experts$|moe_num_shared_experts$", 1),
    (r"num_(local_|routed_)?experts$|n_routed_experts$|moe_num_experts$|^num_experts.*$", 4),
    (r"(moe|expert|shared).*(intermediate|ffn).*size$|expert_ffn_hidden_size$|expert_dim$", 32),
    (r"(intermediate|ffn_hidden|inner|mlp).*(size|dim)$|.*ffn_dim$|^d_ff$|^n_inner$|^dff$|^ffn_size$|mlp_hidden_dim$",
     D),
    (r"(num|n).*attention_heads$|.*attention_heads$|^n_heads?$|^num_heads$|.*_heads$|^heads$", HEADS),
    (r"(num|n)_.*layers?$|^n_layers?$|^(encoder|decoder)_layers$|^depth$|^num_blocks$|^layers$", LAYERS),
    (r"max_position_embeddings$|^n_positions$|max_seq_len$|max_sequence_length$|^n_ctx$|.*max_source_positions$|"
     r".*max_target_positions$|^seq_length$|max_seq_length$|block_size$|^model_max_length$", 64),
    (r"^(mamba_|ssm_)?(d_state|state_size|state_dim)$|mamba_d_state$|ssm_state_size$", 8),
    (r"^(mamba_)?chunk_size$|mamba_chunk_size$", 8),
    (r"sliding_window$|attention_window$|window_size$|local_attention$", 16),
    (r"^image_size$|^img_size$|^crop_size$", 32),
    (r"^patch_size$|^conv_kernel_size$", 8),
    (r"projector_hidden|projection_dim$|proj_dim$|.*_hidden_dim$|hidden_dim$|out_hidden_size$|output_dim$", D),
    (r"^hidden_size_per_layer_input$", 16),
    (r"(^|_)hidden_size$|^d_model$|^n_embd$|^dim$|(^|_)embed_dim$|^embedding_size$|embedding_dim$|^width$|^emb_dim$|"
     r"lru_width$|word_embed_proj_dim$|^n_embed$|^hidden_dims?$|^input_dim$|cross_attention_hidden_size$|"
     r"bottleneck.*dim$|(^|_)channels$|.*conv_dim$|conv_channels$", D),
    (r"num_mel_bins$|^num_mel.*|^n_mels$|input_feat_per_channel$", 16),
    (r"num_embeddings$|^num_queries$|num_query_tokens$|num_latents$|resampler_n_latents$|num_image_tokens$", 4),
    (r"mm_tokens_per_image$", 16),
]  # fmt: skip
_COMPILED = [(re.compile(pattern), value) for pattern, value in _SIZES]

_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}

#: Values of fields by model_type.
SPECIAL: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "florence_vision": {
        "depths": (1, 1, 1, 1), "embed_dim": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "num_groups": (1, 1, 1, 1),
        "projection_dim": D,
    },
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": D},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "chameleon": {"vocabulary_map": {"<image>": V - 2}},
    "emu3": {"vocabulary_map": {"<image>": V - 2}},
    "blip-2": {"image_token_index": V - 2},
    "instructblip": {"image_token_index": V - 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "dots3_note": {"num_key_value_heads": 4},
    "xmod": {"default_language": "en_XX"},
    **{kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}} for
       kind, sections in {
           "qwen2_vl_text": [2, 3, 3], "qwen2_5_vl_text": [2, 3, 3], "qwen2_5_omni_text": [2, 3, 3],
           "paddleocr_vl_text": [2, 3, 3], "glm4v_text": [2, 3, 3], "glm46v_text": [2, 3, 3],
           "glm_ocr_text": [2, 3, 3],
           "glm4v_moe_text": [2, 1, 1],
       }.items()},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "reformer": {"axial_pos_shape": [3, 4], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "local"],
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2},
}  # fmt: skip

#: Fields that make a model random in training; they are set to 0.
_OFF = re.compile(r"drop(out|path|_path|_rate|_prob)?|layerdrop|jitter|_pdrop$|mask_time_prob|mask_feature_prob")


def shrunk(config: PreTrainedConfig, *, lists: bool = True) -> PreTrainedConfig:
    """Return a small configuration of the same kind.

    Args:
        config: the default one.
        lists: shorten lists that have an entry for each layer; False leaves them out, so that the class makes them.
    """
    fields = _fields(config, lists=lists, taken=[V - 1])
    if getattr(config, "is_decoder", False):
        fields["is_decoder"] = True
    made = type(config)(**fields)
    if getattr(made, "is_encoder_decoder", False):  # T5's family leaves these to its checkpoints
        for name in ("decoder_start_token_id", "pad_token_id"):
            if getattr(made, name, None) is None:
                setattr(made, name, 0)
    for name, value in (("vision_start_token_id", V - 9), ("vision_end_token_id", V - 10)):
        if type(config).__name__.endswith("OmniThinkerConfig") or type(config).__name__.endswith("MoeThinkerConfig"):
            setattr(made, name, value)
    return made


def _fields(config: PreTrainedConfig, *, lists: bool, taken: list[int]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    layers = {value for name, value in _own(config).items() if re.search(r"layers?$|depth$", name) and _is_int(value)}
    own = _own(config)
    kinds = own.get("layer_types") or own.get("layers_block_type") or []
    depth = max(LAYERS, len(dict.fromkeys(kinds))) if isinstance(kinds, list) else LAYERS
    head_dim = 8 if "qk_rope_head_dim" in own else HEAD_DIM
    for name, value in own.items():
        if name == "head_dim" and (value is None or _is_int(value)):
            fields[name] = head_dim if value is None else min(value, head_dim)
        elif name == "qk_head_dim":
            continue  # the class computes it as the sum of two others
        elif name == "num_key_value_heads" and (value is None or "qk_rope_head_dim" in own):
            fields[name] = HEADS
        elif re.search(r"feat_extract_layers$|^conv_(dim|kernel|stride)$", name):
            continue
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
            half = int(head_dim * value.get("partial_rotary_factor", own.get("partial_rotary_factor") or 1.0)) // 2
            fields[name] = {**value, "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]}
        elif isinstance(value, PreTrainedConfig):
            fields[name] = {**_fields(value, lists=lists, taken=taken), "model_type": value.model_type}
        elif name in _SPECIAL_TOKENS and value is not None:
            fields[name] = _SPECIAL_TOKENS[name]
        elif re.search(r"token_(id|index)$|^image_token$", name) and _is_int(value):
            if value >= V:
                taken[0] -= 1
                fields[name] = taken[0]
        elif name == "output_router_logits":
            fields[name] = True
        elif isinstance(value, float) and _OFF.search(name):
            fields[name] = 0.0
        elif _is_int(value) and (size := _size(name)) is not None and value > size:
            fields[name] = depth if size == LAYERS and re.search(r"layers?$|depth$", name) else size
        elif isinstance(value, list) and value and len(value) in layers and len(value) > depth:
            if lists:
                fields[name] = _beginning(value, kinds if len(kinds) == len(value) else value, depth)
    fields.update(SPECIAL.get(config.model_type, {}))
    return fields


def _beginning(values: list[Any], kinds: list[Any], depth: int) -> list[Any]:
    """Return ``depth`` entries of a list with one per layer, at least one for each kind of layer."""
    names = [str(kind) for kind in kinds]
    first = [names.index(name) for name in dict.fromkeys(names)][:depth]
    rest = [i for i in range(len(values)) if i not in first]
    return [copy.deepcopy(values[i]) for i in sorted(first + rest[: depth - len(first)])]


def _own(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that may be passed to the constructor."""
    given: dict[str, Any] = {}
    for name in vars(config):
        if not name.startswith("_"):
            try:
                given[name] = getattr(config, name, None)
            except Exception:  # a field with a different value in every layer
                given[name] = vars(config)[name]
    for name, value in list(given.items()):
        key = getattr(type(config), "attribute_map", {}).get(name)
        if key in given and key != name:
            del given[name]
        elif isinstance(value, Mapping) and name in getattr(type(config), "sub_configs", {}):
            del given[name]
    return given


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(name: str) -> int | None:
    return next((value for pattern, value in _COMPILED if pattern.search(name)), None)


def build(class_name: str) -> PreTrainedModel:
    """Return a small model of a class, without dropout and with logits that are far from uniform.

    Raises:
        Exception: what its configuration or its layers raised at the first try.
    """
    kind = getattr(transformers, class_name)
    failure: Exception | None = None
    for lists in (True, False):
        try:
            config = shrunk(_default(kind), lists=lists)
            torch.manual_seed(0)
            model = kind(config)
            if sum(parameter.numel() for parameter in model.parameters()) > 30_000_000:
                large = max(model.named_parameters(), key=lambda item: item[1].numel())
                raise ValueError(f"still large: {large[0]} {tuple(large[1].shape)}")
            return _with_large_logits(model)
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _default(kind: Any) -> PreTrainedConfig:
    if kind.__name__.endswith("EncoderDecoderModel"):
        return _pair(kind)
    config = kind.config_class()
    if hasattr(config, "is_decoder") and kind.__name__.endswith(("ForCausalLM", "LMHeadModel", "WithLMHead")):
        config.is_decoder = True
    return config


def _pair(kind: Any) -> PreTrainedConfig:
    encoders = {
        "Encoder": transformers.BertConfig,
        "Vision": transformers.ViTConfig,
        "Speech": transformers.Wav2Vec2Config,
    }
    encoder = next(config for name, config in encoders.items() if kind.__name__.startswith(name))
    decoder = transformers.BertConfig(is_decoder=True, add_cross_attention=True)
    made = kind.config_class.from_encoder_decoder_configs(encoder(), decoder)
    made.decoder_start_token_id, made.pad_token_id = 1, 0
    return made


def _with_large_logits(model: PreTrainedModel) -> PreTrainedModel:
    """Turn dropout off and enlarge the output layer: with nearly uniform logits every alignment has the same loss."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    head = model.get_output_embeddings()
    if head is not None and isinstance(getattr(head, "weight", None), Tensor):
        with torch.no_grad():
            head.weight.normal_(0.0, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(torch.isfinite(parameter).all()):  # left uninitialised for a checkpoint
                parameter.normal_(0.0, 0.02)
    return model


#: Classes whose forward needs an image although the argument is optional.
_NEED_IMAGES = frozenset({"GitForCausalLM", "IdeficsForVisionText2Text"})


def batch_for(model: PreTrainedModel) -> dict[str, Any]:
    """Return a random batch for a model: text, speech or images as it needs them, with labels."""
    g = torch.Generator().manual_seed(0)
    vocabulary = min(90, int(getattr(model.get_output_embeddings(), "out_features", 90)))
    ids = torch.randint(3, vocabulary, (ROWS, LENGTH), generator=g)
    encodes = bool(getattr(model.config, "is_encoder_decoder", False))
    labels = torch.randint(3, vocabulary, (ROWS, LENGTH), generator=g)
    labels[0, -3:] = -100
    batch: dict[str, Any] = {"labels": labels}
    parameters = inspect.signature(model.forward).parameters
    if "bbox" in parameters:
        batch["bbox"] = torch.zeros(ROWS, LENGTH, 4)
    if type(model).__name__ in ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"):
        ids[:, :4] = model.config.image_token_index  # one for each query token
    if "qformer_input_ids" in parameters:
        batch["qformer_input_ids"] = ids
    main = "input_values" if type(model).__name__ == "SpeechEncoderDecoderModel" else model.main_input_name
    if main in ("input_ids", "inputs_embeds", "decoder_input_ids") or "input_ids" in parameters:
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if main != "input_ids" and main in parameters:
        batch[main] = _features(model, main, g)
        if main not in ("pixel_values", "flattened_patches") and "input_ids" in parameters and encodes:
            del batch["input_ids"], batch["attention_mask"]
    if isinstance(getattr(model.config, "vision_config", None), PreTrainedConfig) and "pixel_values" in parameters:
        required = parameters["pixel_values"].default is inspect.Parameter.empty
        if required or type(model).__name__ in _NEED_IMAGES:
            batch["pixel_values"] = _features(model, "pixel_values", g)
    return batch


def _features(model: PreTrainedModel, name: str, g: torch.Generator) -> Tensor:
    config: Any = model.config
    if name == "pixel_values":
        vision = getattr(config, "vision_config", getattr(config, "encoder", config))
        size = getattr(vision, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(ROWS, getattr(vision, "num_channels", 3), height, width, generator=g)
    if name == "flattened_patches":
        vision = config.vision_config
        patches = torch.randn(ROWS, 6, 2 + vision.patch_embed_hidden_size, generator=g)
        patches[..., :2] = torch.arange(1, 7).view(1, 6, 1)
        return patches
    if name == "input_values":
        return torch.randn(ROWS, 4000, generator=g)
    audio = getattr(config, "audio_config", getattr(config, "encoder_config", config))
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "d_model")
    mels = next((getattr(audio, name) for name in names if hasattr(audio, name)), 16)
    frames = 2 * int(getattr(audio, "max_source_positions", 32))
    last = type(model).__name__.startswith(("Speech2Text", "Seamless", "Pop2Piano"))
    return torch.randn(ROWS, frames, mels, generator=g) if last else torch.randn(ROWS, mels, frames, generator=g)
