"""The claims of ICKD in small: a teacher, students, and the table."""

from benchmarks.ickd.claims import Part, train_student, train_teacher
from benchmarks.ickd.tables import differences, scores, table

TINY = {"train_size": 64, "teacher_size": 64, "val_size": 16, "test_size": 32}


def test_a_teacher_and_its_students_are_scored(tmp_path):
    part = Part("demo", "demo-teacher", ("none", "ickd"), {"ickd": 4.0})
    runs = {"gratings/teacher/0": train_teacher(part.teacher, tmp_path / "teacher-0", 0, TINY)}
    for losses in part.losses:
        runs[f"gratings/{losses}/0"] = train_student(
            part, losses, tmp_path, 0, tmp_path / "teacher-0", TINY
        )
    assert all(run["metric"] == "top-1" and 0 <= run["score"] <= 100 for run in runs.values())
    assert not list(tmp_path.glob("*/0/teacher-*")), "the teacher was trained again"
    found = scores(runs, "gratings")
    gain = runs["gratings/ickd/0"]["score"] - runs["gratings/none/0"]["score"]
    assert differences(found, "ickd", "none") == [gain]
    assert f"{gain:+.2f}" in table("gratings", found)
