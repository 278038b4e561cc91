"""instructor in its mode for servers without tools. A model without training gives no JSON: that is all that may go wrong.

It then asks again, with the answer and what is wrong with it as history.
"""

import sys

import instructor
import openai
from pydantic import BaseModel

url, key = sys.argv[1:]


class Sum(BaseModel):
    value: int


def client_in(mode):
    return instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0), mode=mode)


# the end token, as soon as it may come: an answer that is cut by its length is not asked for again
asked = {"model": "demo", "max_tokens": 12, "logit_bias": {"2": 100}, "extra_body": {"min_tokens": 4}}
asked["messages"] = [{"role": "user", "content": "2"}]
client = client_in(instructor.Mode.MD_JSON)
sent, answers = [], []
client.on("completion:kwargs", lambda *_, **fields: sent.append(list(fields["messages"])))
client.on("completion:response", answers.append)
try:
    client.chat.completions.create(response_model=Sum, max_retries=2, **asked)
except Exception as error:  # noqa: BLE001 - which one depends on the version
    told = repr(error)
    assert "context_length" not in told and "unsupported" not in told and "BadRequest" not in told, told
assert len(answers) >= 2 and all(answer.usage.completion_tokens for answer in answers), answers
assert len(sent[1]) > len(sent[0]) and any(message["role"] == "assistant" for message in sent[1]), sent
chunks = client.chat.completions.create(response_model=None, stream=True, **asked)
assert any(chunk.choices[0].delta.content for chunk in chunks)
try:
    client_in(instructor.Mode.TOOLS).chat.completions.create(response_model=Sum, max_retries=1, **asked)
except Exception as error:  # noqa: BLE001
    assert "describe them in a message" in str(error), error
else:
    raise AssertionError("tools were taken")
