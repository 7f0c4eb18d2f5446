"""A griffe extension that turns lines "name: meaning" of docstrings into lists; Markdown would join them."""

import re

from griffe import Extension

FIELD = re.compile(r"^(\w+(?:, \w+)*): (?=\S)", re.M)
BEFORE_LIST = re.compile(r"^(?!- `| )(.+)\n(?=- `)", re.M)


class Fields(Extension):
    def on_instance(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = BEFORE_LIST.sub(r"\1\n\n", FIELD.sub(r"- `\1`: ", obj.docstring.value))
