"""The openai package as its users call it: answers are appended as they came. Arguments: address, key."""

import sys

import openai

url, key = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
asked = {"model": "demo", "max_tokens": 12, "temperature": 0}
messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "12 + 345?"}]
first = client.chat.completions.create(messages=messages, **asked)
assert first.usage.completion_tokens == 12
messages += [first.choices[0].message, {"role": "user", "content": "and?"}]
second = client.chat.completions.create(messages=messages, **asked)
text = ""
for chunk in client.chat.completions.create(
    messages=messages, stream=True, stream_options={"include_usage": True}, **asked
):
    text += chunk.choices[0].delta.content or "" if chunk.choices else ""
assert text == second.choices[0].message.content and chunk.usage.completion_tokens == 12
# the stream helper and `parse` make messages with a field more, and refuse what ends by its length
with client.chat.completions.stream(messages=messages, stop=text[-1], **asked) as stream:
    joined = stream.get_final_completion().choices[0].message
parsed = client.chat.completions.parse(messages=messages, stop=text[-1], **asked).choices[0].message
assert joined.content == parsed.content == text[: text.index(text[-1])]
for message in (joined, parsed, joined.model_dump(), parsed.model_dump()):
    again = [*messages, message, {"role": "user", "content": "and?"}]
    assert client.chat.completions.create(messages=again, **asked).usage.completion_tokens == 12
try:
    client.chat.completions.create(messages=[{"role": "user", "content": "ab " * 1600}], **asked)
except openai.BadRequestError as error:
    assert error.code == "context_length_exceeded"
else:
    raise AssertionError("a prompt that is too long was taken")
