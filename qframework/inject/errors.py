"""Errors in the declaration of a quantizer. Each is also a builtin error that a caller would expect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantizerError(Exception):
    """A quantizer can't be built as it is declared."""


class UnknownNameError(QuantizerError, TypeError):
    """A keyword or attribute that nothing reads."""


class UnusedKeywordWarning(UserWarning):
    """A keyword that quantizers know and the one that it was given to has no use for."""


class PolicyValueError(QuantizerError, ValueError):
    """A value of the wrong type or out of range."""


class MissingDependencyError(QuantizerError, AttributeError):
    """A name that something needs and nothing gives."""


class CircularDependencyError(QuantizerError, RuntimeError):
    """Names that need each other."""


#: What other libraries and papers call a policy.
_CALLED_ELSEWHERE = {
    "bit_width": "bit bits n_bit n_bits nbit nbits num_bit num_bits w_bits a_bits wbits abits bitdepth",
    "scaling_per_output_type": "granularity per_channel per_tensor per_group channel_wise channelwise per_channel_scaling",
    "group_size": "block_size blocksize q_group_size",
    "float_to_int_impl_type": "rounding round_mode rounding_mode round_type rounding_type stochastic_rounding",
    "restrict_scaling_type": "po2 pot power_of_two power_of_2 po2_scale",
    "scaling_impl_type": "learn_scale learned_scale learnable_scale trainable_scale const_scale scaling_learned",
    "scaling_init": "init_scale scale_init",
    "scaling_stats_op": "observer stats_op",
    "scaling_stats_momentum": "momentum averaging_constant",
    "collect_stats_steps": "calibration_steps stats_steps",
    "quant_delay_steps": "quant_delay delay_steps",
    "high_percentile_q": "percentile percentile_q",
    "exponent_bit_width": "e_bits ebits exp_bits exponent_bits exp_width exponent_width",
    "mantissa_bit_width": "m_bits mbits man_bits mantissa_bits man_width mantissa_width",
}
_MEANT = {word: name for name, words in _CALLED_ELSEWHERE.items() for word in words.split()}


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``names`` that other libraries call so, else the most similar one, whatever their case; None when none is similar."""
    spelled = {n.lower(): n for n in names}
    meant = _MEANT.get(name.lower())
    if meant in spelled:
        return spelled[meant]
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=cutoff)
    if not close and cutoff <= 0.6 and len(name) > 3:  # the beginning of one name alone
        begins = [n for n in spelled if n.startswith(name.lower())]
        close = begins if len(begins) == 1 else []
    return spelled[close[0]] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a sentence and a question with the nearest name, or nothing."""
    close = nearest(name, names)
    return f". Did you mean {close!r}?" if close else ""


class PolicyTypeError(QuantizerError, TypeError):
    """A value of a type that a policy can't be."""


class BuildError(QuantizerError, RuntimeError):
    """A module of a quantizer refuses how it is put together."""


class ImmutableQuantizerError(QuantizerError, AttributeError):
    """An attempt to change a quantizer class."""
