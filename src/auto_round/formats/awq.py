"""AWQ gemm folders: ``quant_method: "awq"``, 4 bits, one scheme for the whole model.

zero_point is true also for symmetric schemes, whose qzeros are 8 throughout: readers then take the zero points from the
file, and none of them has to know the symmetric scheme. ``sym`` says it to those that do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.errors import FormatError
from auto_round.formats.base import CodedModel, Export, takes_the_users
from auto_round.formats.config import CheckpointConfig
from auto_round.formats.folder import folder_sizes, method_of, open_folder, prove_codes, read_settings, write_folder
from auto_round.formats.layouts import AWQ
from auto_round.spec.blocks import not_integer
from auto_round.spec.plan import LinearShape, Plan
from auto_round.spec.scheme import Scheme

HEAD = "lm_head"  # named as kept for the readers that would convert it


class AwqFormat:
    """Writer and reader of the format."""

    name = "auto_awq"
    holds_act_order = False
    holds_conv1d = False
    holds_tokenizer = False
    prescribe = takes_the_users

    def refuse(self, shape: LinearShape, scheme: Scheme) -> str | None:
        """4 bits, groups that divide the inputs, dimensions that are multiples of 32."""
        return not_integer(scheme) or AWQ.refuse(scheme, shape.out_features, shape.in_features)

    def check(self, plan: Plan) -> None:
        """One scheme, in the blocks only."""
        schemes = Counter(layer.scheme.name for layer in plan.quantised.values() if layer.scheme)
        if len(schemes) > 1:
            found = ", ".join(f"{name} in {count} layers" for name, count in schemes.items())
            raise FormatError(
                f"auto_awq holds one scheme for the whole model, not {found}; use auto_round or auto_gptq"
            )
        blocks = tuple(f"{name}." for name in plan.block_lists)
        outside = [name for name in plan.quantised if not name.startswith(blocks)]
        if outside:
            raise FormatError(
                f"auto_awq cannot hold a quantised {outside[0]!r}: its readers convert the blocks only; leave out "
                "quant_lm_head, or use auto_round"
            )

    def sizes(self, export: Export, largest_shard: int | None) -> Mapping[str, int]:
        """The shards and their index."""
        return folder_sizes(export, largest_shard, AWQ)

    def write(self, export: Export, folder: Path, largest_shard: int | None) -> None:
        """Write weights, config.json and the source's other files into `folder`."""
        write_folder(export, folder, largest_shard, AWQ, {**self.settings(export.plan), **export.provenance})

    def settings(self, plan: Plan) -> dict[str, Any]:
        """The quantization_config of a plan, without provenance."""
        scheme = next(layer.scheme for layer in plan.quantised.values())
        assert scheme is not None
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "sym": scheme.sym,
            "modules_to_not_convert": list(dict.fromkeys([HEAD, *plan.kept, *plan.routers])),
            "to_quant_block_names": ",".join(plan.block_lists),
            "provider": "auto-round",
        }

    def prove(self, export: Export, folder: Path) -> None:
        """Every layer must read back bit for bit."""
        prove_codes(export, self._open(folder))

    def open(self, path: Path, scratch: Path) -> CodedModel | None:
        """Open gemm folders of any writer."""
        return self._open(path) if method_of(path) == "awq" else None

    def _open(self, folder: Path) -> CodedModel:
        given = read_settings(folder)[1]
        if "sym" in given:  # says more than zero_point, which is true in all that we write
            given.pop("zero_point", None)
        config = CheckpointConfig.parse(given)
        return open_folder(
            folder, format=self.name, detail="version gemm", layout=AWQ, rules=config, blocks=config.blocks
        )


FORMAT = AwqFormat()
