"""Facts about the grades. Run with `python -m unittest scorecard.tests.test_judge`."""

import unittest
from dataclasses import replace

from ..client import Seen, Shape
from ..engine import Received
from ..judge import PASS, Demand, Grade, Played, Rejected, Whole, at_most, busy_pause, from_b, judge
from ..story import TEXT

WHOLE = Seen(
    sent=0.0,
    status=200,
    text=TEXT,
    finish_reason="stop",
    has_done=True,
    models=["m-b"],
    usage={"prompt_tokens": 5, "completion_tokens": 8},
    ended=1.0,
)
CUT = replace(WHOLE, text="Once upon", finish_reason=None, has_done=False)
ERROR = {"message": "scripted", "code": "queue_full"}


def tries(*times: float) -> list[Received]:
    return [Received("/v1/completions", {}, at, number) for number, at in enumerate(times)]


def grade(seen: Seen, demand: Demand | None = None, a: list[Received] | None = None) -> Grade:
    return judge(demand or Whole(), Played(Shape.CHAT, seen, a or tries(0.0), [])).grade


class WholeText(unittest.TestCase):
    def test_a_whole_text_passes(self) -> None:
        self.assertEqual(judge(Whole(), Played(Shape.CHAT, WHOLE, tries(0.0), [])), PASS)

    def test_a_broken_rule_makes_it_partial(self) -> None:
        busy = tries(0.0, 0.5)
        self.assertEqual(grade(WHOLE, Whole((busy_pause(1),)), busy), Grade.PARTIAL)
        self.assertEqual(grade(WHOLE, Whole((at_most(1),)), busy), Grade.PARTIAL)
        failed = replace(WHOLE, models=["m-a"])
        self.assertEqual(grade(failed, Whole((from_b,))), Grade.PARTIAL)
        miscounted = replace(WHOLE, usage={"completion_tokens": 4})
        self.assertEqual(grade(miscounted), Grade.PARTIAL)
        self.assertEqual(grade(replace(WHOLE, has_done=False)), Grade.PARTIAL)

    def test_a_hang_fails_even_with_the_whole_text(self) -> None:
        self.assertEqual(grade(replace(WHOLE, ended=None)), Grade.FAIL)


class TruncatedText(unittest.TestCase):
    def test_an_error_event_without_an_end_marker_is_safe(self) -> None:
        self.assertEqual(grade(replace(CUT, error=ERROR)), Grade.SAFE)

    def test_an_unclean_end_is_safe(self) -> None:
        self.assertEqual(grade(replace(CUT, unclean="reset")), Grade.SAFE)

    def test_an_orderly_end_fails(self) -> None:
        self.assertEqual(grade(CUT), Grade.FAIL)
        self.assertEqual(grade(replace(CUT, has_done=True)), Grade.FAIL)
        self.assertEqual(grade(replace(CUT, error=ERROR, has_done=True)), Grade.FAIL)

    def test_a_repeated_text_fails(self) -> None:
        self.assertEqual(grade(replace(WHOLE, text="Once" + TEXT)), Grade.FAIL)


class Rejection(unittest.TestCase):
    REJECTED = replace(CUT, status=429, text="", error=ERROR)

    def test_the_demanded_rejection_passes(self) -> None:
        self.assertEqual(grade(self.REJECTED, Rejected(429, "queue_full")), Grade.PASS)

    def test_another_status_or_code_is_safe(self) -> None:
        self.assertEqual(grade(self.REJECTED, Rejected(400)), Grade.SAFE)
        self.assertEqual(grade(self.REJECTED, Rejected(429, "other")), Grade.SAFE)
        self.assertEqual(grade(self.REJECTED), Grade.SAFE)

    def test_an_answer_instead_is_partial(self) -> None:
        self.assertEqual(grade(WHOLE, Rejected(400)), Grade.PARTIAL)


if __name__ == "__main__":
    unittest.main()
