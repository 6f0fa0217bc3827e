"""What fake_tools puts on PATH under another name: writes its call down, and answers as it was told."""

import json
import os
import signal
import sys

here = os.path.dirname(os.path.abspath(sys.argv[0]))
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
stdin = "" if sys.stdin.isatty() else sys.stdin.read()
line = json.dumps({"argv": argv, "stdin": stdin}) + "\n"
descriptor = os.open(os.path.join(here, "calls.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
os.write(descriptor, line.encode())
with open(os.path.join(here, "calls.jsonl")) as file:
    earlier = [json.loads(entry)["argv"] for entry in file]


def fits(words, call):
    rest = iter(call)
    return all(word in rest for word in words)


answers = []
if os.path.exists(os.path.join(here, "answers.json")):
    with open(os.path.join(here, "answers.json")) as file:
        answers = [answer for answer in json.load(file) if fits(answer["words"], argv)]
if answers:
    same = [answer for answer in answers if answer["words"] == answers[0]["words"]]
    count = sum(fits(answers[0]["words"], call) for call in earlier)
    answer = same[min(count, len(same)) - 1]
    sys.stdout.write(answer["out"])
    sys.stderr.write(answer["err"])
    sys.stdout.flush()
    if answer["stay"]:
        signal.pause()
    sys.exit(answer["code"])
