"""The example of multiple choice asks about names that its training did not have."""

from support.examples import imported


def test_web_colours_are_no_names_of_the_survey(monkeypatch):
    example = imported("multiple_choice", monkeypatch)
    survey = {row["text"] for row in example.questions(example.XKCD_COLORS)}
    web = [row["text"] for row in example.questions(example.WEB)]
    assert len(web) == 78 and not survey.intersection(web)
    dropped = [row["text"] for row in example.questions(example.CSS4_COLORS)]
    assert set(dropped) - set(web) <= survey
