"""The linker's map as `make order` reads it, and the script that it writes: a map made by hand."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_bcs.bench.order import Section, functions_of, script, sections_of

MAP = """
Discarded input sections

 .text.gone
                0x0000000000000000       0x10 /lib/libx.a(gone.o)

Linker script and memory map

 .text          0x0000000000401050       0x20 CMakeFiles/program.dir/main.cpp.o
 .text.empty    0x0000000000401070        0x0 CMakeFiles/program.dir/main.cpp.o
 .text._ZN8edge_bcs12kernels_avx24walkILi8EEEvv
                0x0000000000401000       0x48 CMakeFiles/program.dir/walk.cpp.o
 .text.unlikely
                0x0000000000401080       0x08 /usr/lib/libjpeg.a(jidctint.o)
 .data.table    0x0000000000402000       0x30 CMakeFiles/program.dir/walk.cpp.o
"""
WALK = ".text._ZN8edge_bcs12kernels_avx24walkILi8EEEvv"


@pytest.fixture
def sections(tmp_path: Path) -> list[Section]:
    (tmp_path / "program.map").write_text(MAP)
    return sections_of(tmp_path / "program.map")


def test_code_is_found_by_address(sections: list[Section]) -> None:
    assert [(one.address, one.size, one.name) for one in sections] == [
        (0x401000, 0x48, WALK),
        (0x401050, 0x20, ".text"),
        (0x401080, 0x08, ".text.unlikely"),
    ]


def test_names_that_many_share_are_told_with_their_object(sections: list[Section]) -> None:
    assert [one.pattern for one in sections] == [
        f"*({WALK})",
        "*main.cpp.o(.text)",
        "*libjpeg.a:jidctint.o(.text.unlikely)",
    ]


def test_a_script_lists_each_section_once_as_it_ran_and_its_twin_on_arm(sections: list[Section]) -> None:
    walk, main, decode = sections
    text = script([[main, walk], [walk, decode]])
    assert re.findall(r"^    (\*.*)$", text, re.M) == [
        "*main.cpp.o(.text)",
        f"*({WALK})",
        "*(.text._ZN8edge_bcs12kernels_neon4walkILi4EEEvv)",
        "*libjpeg.a:jidctint.o(.text.unlikely)",
    ]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler here")
def test_a_linker_follows_it(tmp_path: Path) -> None:
    """Of two functions the one that ran first lies first, whatever their order in the source."""
    source, compiled = tmp_path / "main.c", tmp_path / "main.o"
    functions = "int early(void){return 1;} int late(void){return 2;}"
    source.write_text(f"{functions} int main(void){{return late() - early();}}")
    subprocess.run(["gcc", "-O0", "-ffunction-sections", "-c", source, "-o", compiled], check=True)

    def linked(name: str, *options: object) -> tuple[list[Section], dict[str, int]]:
        program, map_file = tmp_path / name, tmp_path / f"{name}.map"
        subprocess.run(
            ["gcc", compiled, "-o", program, f"-Wl,-Map={map_file}", *map(str, options)], check=True
        )
        return sections_of(map_file), {name: address for address, name in functions_of(program).items()}

    found, before = linked("before")
    assert before["early"] < before["late"]
    by_name = {section.name: section for section in found}
    (tmp_path / "order.ld").write_text(script([[by_name[".text.late"], by_name[".text.early"]]]))
    after = linked("after", "-T", tmp_path / "order.ld")[1]
    assert after["late"] < after["early"] < after["main"]
    assert subprocess.run([tmp_path / "after"]).returncode == 1
