"""A griffe extension: lines "name: meaning" of a docstring become a list, which Markdown would join to one paragraph."""

import re

from griffe import Extension

FIELD = re.compile(r"^(\w+(?:, \w+)*): (?=\S)", re.M)


class Fields(Extension):
    def on_instance(self, *, obj, **_):
        if obj.docstring:
            text = FIELD.sub(r"- `\1`: ", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?<!^)(?<=\S)\n(- `)", r"\n\1", re.sub(r"\n((?!- `|\s).*)\n(- `)", r"\n\1\n\n\2", text))
