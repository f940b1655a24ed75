"""The fields of config.json, each checked. Standard library only.

What cannot be run raises `ConfigError` with one sentence: the field, its value, the remedy.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

from vllm_kimi_linear import ARCHITECTURE
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.quantization import FIELD, Quantization

# The kernels tile a head by powers of two, and tensor cores need at least 16.
KDA_HEAD_DIMS = (16, 32, 64, 128)
CONV_KERNEL_SIZES = (2, 3, 4)

LINEAR = "linear_attn_config"
LINEAR_KEYS = {"full_attn_layers", "kda_layers", "head_dim", "num_heads", "short_conv_kernel_size"}

# Fields of related models and the values at which they do nothing here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "q_lora_rank": (None,),
    "attention_bias": (None, False),
    "attn_res_block_size": (None,),
    "mla_use_output_gate": (None, False),
    "routed_expert_hidden_size": (None,),
    "latent_moe_use_norm": (None, False),
    "activation_situ_beta": (None,),
    "activation_situ_linear_beta": (None,),
    "topk_method": (None, "noaux_tc"),
    "num_nextn_predict_layers": (None, 0),
    "rope_scaling": (None,),
}


def checked_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelSizes` that config.json decides. Raises ConfigError at the first that cannot be run."""
    _check_fixed_fields(config)
    config = {**config, **_linear_fields(config)}
    kinds = _layer_types(config)
    moe = _layer_moe(config, len(kinds))
    return {
        "hidden_size": _positive(config, "hidden_size"),
        "vocab_size": _positive(config, "vocab_size"),
        "max_context": _max_context(config),
        "layer_types": kinds,
        "layer_moe": moe,
        "rms_norm_eps": _positive_number(config, "rms_norm_eps"),
        "tied_embeddings": _flag(config, "tie_word_embeddings", False),
        "quantization": None if (found := config.get(FIELD)) is None else Quantization.from_config(found),
        **_mla_fields(config),
        **(_kda_fields(config) if "kda" in kinds else {}),
        **({} if all(moe) else {"intermediate_size": _positive(config, "intermediate_size")}),
        **(_moe_fields(config) if any(moe) else {}),
    }


def original_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config in the original's spelling, whoever wrote it or holds it.

    vLLM's class keeps that spelling. transformers' class, and what it saves, has other names for the linear-attention
    fields and writes the layouts out as layer_types and mlp_layer_types; it has no linear_attn_config unless it was
    given one, and it implements only NoPE and the sigmoid router, so that it has no field for either.
    """
    config = dict(fields)
    if config.get("layer_types") is None or config.get("mlp_layer_types") is None:
        return config
    kinds, blocks = (_list(config, name, str, "each layer's kind") for name in ("layer_types", "mlp_layer_types"))
    config.setdefault("mla_use_nope", True)
    linear = {
        "kda_layers": [i + 1 for i, kind in enumerate(kinds) if kind == "linear_attention"],
        "full_attn_layers": [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"],
        "num_heads": config.get("linear_num_heads"),
        "head_dim": config.get("linear_head_dim"),
        "short_conv_kernel_size": config.get("linear_conv_kernel_dim"),
    }
    config.setdefault(LINEAR, linear)
    dense = [kind == "dense" for kind in blocks]
    first = dense.index(False) if False in dense else len(dense)
    if any(dense[first:]):
        raise ConfigError(f"mlp_layer_types is {blocks!r}; dense layers must come first")
    config["first_k_dense_replace"] = first
    config["moe_layer_freq"] = 1
    return config


def is_int(value: Any) -> TypeGuard[int]:
    """Not True or False, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def _show(value: Any) -> str:
    return "missing" if value is None else repr(value)


def _only(config: Mapping[str, Any], name: str, value: Any, remedy: str, default: Any = None) -> None:
    found = config.get(name, default)
    if found != value or type(found) is not type(value):
        raise ConfigError(f"{name} is {_show(found)}; {remedy}")


def _list(config: Mapping[str, Any], name: str, kind: type, content: str) -> list[Any]:
    value = config.get(name)
    if not isinstance(value, list | tuple) or not all(type(item) is kind for item in value):
        raise ConfigError(f"{name} is {_show(value)}; give the list of {content}")
    return list(value)


def _whole(config: Mapping[str, Any], name: str, least: int, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not is_int(value) or value < least:
        raise ConfigError(f"{name} is {_show(value)}; give a whole number from {least}")
    return value


def _positive(config: Mapping[str, Any], name: str) -> int:
    return _whole(config, name, 1)


def _positive_number(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    if not (is_int(value) or isinstance(value, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {_show(value)}; give a number above 0")
    return float(value)


def _flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; give true or false")
    return value


def _check_fixed_fields(config: Mapping[str, Any]) -> None:
    """Fields of which one value is implemented."""
    _only(config, "model_type", "kimi_linear", "this implementation runs kimi_linear only", default="kimi_linear")
    names = config.get("architectures")
    if names is not None and names not in ([ARCHITECTURE], (ARCHITECTURE,)):
        raise ConfigError(f"architectures is {names!r}; it must be [{ARCHITECTURE!r}]")
    for name, values in NEUTRAL.items():
        if config.get(name) not in values:
            wanted = " or ".join("unset" if v is None else str(v).lower() for v in values)
            raise ConfigError(f"{name} is {config[name]!r}; that is not implemented, it must be {wanted}")
    _only(config, "hidden_act", "silu", "only 'silu' is implemented")
    _only(config, "mla_use_nope", True, "it must be true, attention with rotary positions is not implemented")
    # rope_theta alone rotates nothing. A scaling rule may also change the softmax scale, so it is not harmless.
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or (rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise ConfigError(f"rope_parameters is {rope!r}; this model has no rotary positions, leave it unset")


def _max_context(config: Mapping[str, Any]) -> int | None:
    """The original's model_max_length; vLLM adds a max_position_embeddings of its own, which counts for less."""
    for name in ("model_max_length", "max_position_embeddings"):
        if config.get(name) is not None:
            return _positive(config, name)
    return None


def _linear_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of linear_attn_config by the names that messages give them."""
    linear = config.get(LINEAR)
    if not isinstance(linear, Mapping):
        raise ConfigError(
            f"{LINEAR} is {_show(linear)}; give the checkpoint's own lists kda_layers and full_attn_layers, "
            "they have no default"
        )
    for name in sorted(linear.keys() - LINEAR_KEYS):
        if linear[name] is not None and linear[name] is not False:
            raise ConfigError(f"{LINEAR}.{name} is {linear[name]!r}; that is not implemented, remove it")
    return {f"{LINEAR}.{name}": value for name, value in linear.items()}


def _layer_list(config: Mapping[str, Any], name: str, layers: int) -> list[int]:
    numbers = _list(config, name, int, "layer numbers, counted from 1")
    for number in numbers:
        if not 1 <= number <= layers:
            raise ConfigError(f"{name} has layer {number}; layers count from 1 to num_hidden_layers = {layers}")
        if numbers.count(number) > 1:
            raise ConfigError(f"{name} has layer {number} more than once; name each layer once")
    return numbers


def _layer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    layers = _positive(config, "num_hidden_layers")
    kda = _layer_list(config, f"{LINEAR}.kda_layers", layers)
    mla = _layer_list(config, f"{LINEAR}.full_attn_layers", layers)
    for number in range(1, layers + 1):
        if number in kda and number in mla:
            raise ConfigError(f"{LINEAR} has layer {number} in both kda_layers and full_attn_layers; keep it in one")
        if number not in kda and number not in mla:
            raise ConfigError(f"{LINEAR} has layer {number} in neither kda_layers nor full_attn_layers; add it to one")
    if not mla:
        raise ConfigError(f"{LINEAR}.full_attn_layers is []; give at least one MLA layer, this model needs one")
    return tuple("kda" if number in kda else "mla" for number in range(1, layers + 1))


def _layer_moe(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    experts = _whole(config, "num_experts", 0, default=0)
    if not experts:
        return (False,) * layers
    first = _whole(config, "first_k_dense_replace", 0)  # no default: the two public config classes differ
    every = _whole(config, "moe_layer_freq", 1, default=1)
    return tuple(i >= first and i % every == 0 for i in range(layers))


def _kda_fields(config: Mapping[str, Any]) -> dict[str, int]:
    for name, choices in (("head_dim", KDA_HEAD_DIMS), ("short_conv_kernel_size", CONV_KERNEL_SIZES)):
        value = _positive(config, f"{LINEAR}.{name}")
        if value not in choices:
            known = ", ".join(map(str, choices))
            raise ConfigError(f"{LINEAR}.{name} is {value}; the kernels take one of {known}")
    names = {"kda_heads": "num_heads", "kda_head_dim": "head_dim", "conv_kernel_size": "short_conv_kernel_size"}
    return {size: _positive(config, f"{LINEAR}.{name}") for size, name in names.items()}


def _mla_fields(config: Mapping[str, Any]) -> dict[str, int]:
    heads = _positive(config, "num_attention_heads")
    kv_heads = _whole(config, "num_key_value_heads", 1, default=heads)
    if kv_heads != heads:
        raise ConfigError(f"num_key_value_heads is {kv_heads}; MLA needs as many as num_attention_heads = {heads}")
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    return {"attention_heads": heads} | {name: _positive(config, name) for name in names}


def _moe_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    _only(config, "moe_router_activation_func", "sigmoid", "only 'sigmoid' is implemented", default="sigmoid")
    experts = _positive(config, "num_experts")
    groups = _whole(config, "num_expert_group", 1, default=1)
    kept = _whole(config, "topk_group", 1, default=1)
    # A group is ranked by its two best experts.
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise ConfigError(
            f"num_expert_group is {groups}; it must divide num_experts = {experts} into groups of two or more"
        )
    if kept > groups:
        raise ConfigError(f"topk_group is {kept}; give at most num_expert_group = {groups}")
    if groups > 1 and not _flag(config, "use_grouped_topk", True):
        raise ConfigError(
            f"use_grouped_topk is False with num_expert_group = {groups}; set it to true or use one group"
        )
    chosen, eligible = _positive(config, "num_experts_per_token"), experts // groups * kept
    if chosen > eligible:
        raise ConfigError(
            f"num_experts_per_token is {chosen}; only {eligible} of num_experts = {experts} can be chosen"
        )
    return {
        "moe_intermediate_size": _positive(config, "moe_intermediate_size"),
        "num_experts": experts,
        "experts_per_token": chosen,
        "shared_experts": _whole(config, "num_shared_experts", 0, default=0),
        "expert_groups": groups,
        "topk_groups": kept,
        "renormalize": _flag(config, "moe_renormalize", True),
        "routed_scaling_factor": _positive_number(config, "routed_scaling_factor"),
    }
