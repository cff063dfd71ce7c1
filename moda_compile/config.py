"""What a conversion is asked to do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from moda_compile.errors import InputError

FFNKV = Literal["none", "projected", "shared"]
AccumulatorDType = Literal["float32", "model"]


@dataclass(frozen=True, kw_only=True)
class MoDAConfig:
    """Options of a conversion. Immutable, and part of every compiled graph's identity.

    Attributes:
        ffn_kv: which depth slots the feed-forward networks (FFNs) write, beside the attention's:

            - ``"none"``: none. No new parameters (paper, Table 3, row 3).
            - ``"projected"``: each FFN's input goes through a new light K/V projection; the key
              then gets its layer's own treatment (key norm, rotation). New parameters
              ``moda_key_weight`` and ``moda_value_weight`` [Hk*d, D] on each FFN module that
              writes (paper, Table 3, row 4: the paper's default).
            - ``"shared"``: each FFN's input goes through that layer's own K/V projection.
              No new parameters.

        depth: ``False`` makes the conversion change nothing at all, for ablations: the model
            computes bit for bit what it computed before.
        accumulator_dtype: dtype in which backward accumulates a slot's gradient over its readers.
            ``"float32"`` (float64 for a float64 model) rounds once; ``"model"`` takes half the
            memory in bf16/fp16 and rounds once per reading layer, as autograd itself does. Where a
            GPU gathers the gradients from all readers at once, both round once and keep nothing.

    Raises:
        InputError: for a value that is none of the above.
    """

    ffn_kv: FFNKV = "none"
    depth: bool = True
    accumulator_dtype: AccumulatorDType = "float32"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("ffn_kv", get_args(FFNKV)),
            ("depth", (True, False)),
            ("accumulator_dtype", get_args(AccumulatorDType)),
        ):
            # 1 == True, but the options as JSON are part of a graph's identity: types count too.
            value = getattr(self, name)
            if not any(value == x and type(value) is type(x) for x in allowed):
                raise InputError(
                    f"MoDAConfig.{name}: got {getattr(self, name)!r}, expected one of {allowed}."
                )

    def to_json(self) -> str:
        """The configuration as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> MoDAConfig:
        """Inverse of :meth:`to_json`.

        Raises:
            InputError: if ``text`` is no configuration.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise InputError(f"no MoDAConfig as JSON: {text!r}: {error}") from error
