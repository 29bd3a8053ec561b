#!/usr/bin/env python3
"""Writes csrc/bindings/state/docs.h: the docstrings of python/stateful_kv/_state.pyi for `help()`.

With --check it writes nothing and fails if the file is out of date.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

STUB = "python/stateful_kv/_state.pyi"
HEADER = "csrc/bindings/state/docs.h"

BEGIN = """// Docstrings of the state objects. Made by scripts/make_state_docs.py from
// python/stateful_kv/_state.pyi: edit that, then run the script.
#pragma once

#include <array>
#include <string_view>

namespace skv::bindings {

struct Doc {
  std::string_view name;
  const char* text;  // begins with the signature where Python takes it from there
};

// clang-format off
inline constexpr std::array kDocs{
"""
END = """};
// clang-format on

// A name that has no docstring does not compile.
consteval const char* doc(std::string_view name) {
  for (const Doc& entry : kDocs) {
    if (entry.name == name) return entry.text;
  }
  throw "no docstring of this name";
}

}  // namespace skv::bindings
"""


def signature(function: ast.FunctionDef) -> str:
    """The first lines of a docstring, in the form that `inspect.signature` reads."""
    arguments = ast.arguments(
        posonlyargs=[],
        args=[ast.arg(arg.arg) for arg in function.args.args],
        kwonlyargs=[],
        kw_defaults=[],
        defaults=function.args.defaults,
    )
    return f"{function.name}({ast.unparse(arguments)})\n--\n\n"


def docs_of(stub: str) -> Iterator[tuple[str, str]]:
    """Names such as "PagePool.allocate", and their texts."""
    for node in ast.parse(stub).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, signature(node) + (ast.get_docstring(node) or "")
        elif isinstance(node, ast.ClassDef):
            yield node.name, ast.get_docstring(node) or ""
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    is_property = bool(method.decorator_list)
                    head = "" if is_property else signature(method)
                    yield f"{node.name}.{method.name}", head + (ast.get_docstring(method) or "")


def header_of(stub: str) -> str:
    """The content of the header."""
    entries = [f'    Doc{{"{name}", R"doc({text})doc"}},\n' for name, text in docs_of(stub)]
    return BEGIN + "".join(entries) + END


def main(root: Path, arguments: list[str]) -> int:
    header, content = root / HEADER, header_of((root / STUB).read_text())
    if arguments == ["--check"]:
        if header.read_text() == content:
            return 0
        print(f"{HEADER} is out of date: run scripts/make_state_docs.py", file=sys.stderr)
        return 1
    header.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[1], sys.argv[1:]))
