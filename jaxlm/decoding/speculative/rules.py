"""Rules of acceptance by name."""

from typing import Any

from jaxlm.decoding.speculative.drafters.base import Drafter
from jaxlm.decoding.speculative.verify import Match, Rule

RULES: dict[str, Any] = {"match": Match}


def make(rule: str | Rule | None, drafter: Drafter) -> Rule:
    """The rule of this name, or the rule given; None is "match".

    Raises:
      ValueError: for a name that is none, or a rule that is wrong for how the drafter draws.
    """
    rule = "match" if rule is None else rule
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"there is no rule {rule!r}; there are {', '.join(RULES)}")
        rule = RULES[rule]()
    if rule.draws is not None and drafter.draws not in rule.draws:
        raise ValueError(f"the rule {type(rule).__name__} is for drafts that are {' or '.join(sorted(rule.draws))}, those of "
                         f"{type(drafter).__name__} are {drafter.draws}")
    return rule
