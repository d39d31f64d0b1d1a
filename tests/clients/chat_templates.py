"""Renders every chat template of a folder with Python's Jinja, configured as in Hugging Face's `apply_chat_template`
(transformers 5.24, `utils/chat_template_utils.py`). This is the reference for Tokenway's rendering.

usage: chat_templates.py FOLDER <request.json >results.json

The request has `bos_token`, `eos_token`, `now` (an ISO date and time) and `conversations`, lists of [role, content].
The results are [[file name, [result for each conversation]], …]. A result is {"text": …}, {"refused": …} with the
message of the template's `raise_exception`, or {"failed": …} with a Python error.
"""

import json
import pathlib
import sys
from datetime import datetime

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Refusal(jinja2.exceptions.TemplateError):
    """A template called `raise_exception`."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` renders its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_render")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render(self, caller):
        return caller()


def environment(now):
    def raise_exception(message):
        raise Refusal(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def render(template, conversation, request):
    messages = [{"role": role, "content": content} for role, content in conversation]
    tokens = {"bos_token": request["bos_token"], "eos_token": request["eos_token"]}
    arguments = {"messages": messages, "add_generation_prompt": True, **tokens}
    try:
        try:
            text = template.render(tools=None, documents=None, **arguments)
        except TypeError:
            # The template loops over the tools. Tokenway renders it without tools.
            text = template.render(**arguments)
    except Refusal as refusal:
        return {"refused": refusal.message}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"text": text}


def main():
    request = json.load(sys.stdin)
    jinja = environment(datetime.fromisoformat(request["now"]))
    results = []
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jinja")):
        template = jinja.from_string(path.read_text())
        conversations = request["conversations"]
        results.append([path.name, [render(template, conversation, request) for conversation in conversations]])
    json.dump(results, sys.stdout)


main()
