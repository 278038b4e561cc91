"""langchain-openai as its users call it. Arguments: address, key."""

import sys

import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

url, key = sys.argv[1:]
chat = ChatOpenAI(model="demo", base_url=f"{url}/v1", api_key=key, max_tokens=12, temperature=0, max_retries=0)
history = [SystemMessage("be brief"), HumanMessage("12 + 345?")]
first = chat.invoke(history)
assert first.usage_metadata["output_tokens"] == 12
history += [first, HumanMessage("and?")]
second = chat.invoke(history)
pieces = list(chat.stream(history))
assert "".join(piece.content for piece in pieces) == second.content
assert len(chat.batch([history, history[:2]])) == 2
plain = OpenAI(model="demo", base_url=f"{url}/v1", api_key=key, max_tokens=12, temperature=0, max_retries=0)
assert plain.invoke("Tom has 3 apples")
try:
    chat.invoke("ab " * 1600)
except openai.BadRequestError as error:
    assert error.code == "context_length_exceeded"
else:
    raise AssertionError("a prompt that is too long was taken")
try:
    chat.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke(history)
except openai.BadRequestError as error:
    assert error.param == "tools" and "describe them in a message" in str(error)
else:
    raise AssertionError("tools were taken")
