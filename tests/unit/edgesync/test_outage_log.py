from edgesync.io.outage_log import LOG_AGAIN_S, DetourLog, OutageLog


def test_the_first_failure_is_told_then_one_in_a_while() -> None:
    log = OutageLog()
    assert log.up()
    log.settled()
    told = [(now, log.failed(now=float(now))) for now in range(0, 700, 7)]
    assert [one for one in told if one[1] is not None] == [(0, 0), (301, 42), (602, 42)]
    assert log.up()


def test_what_comes_and_goes_is_told_now_and_then_and_a_long_stay_ends_it() -> None:
    log = OutageLog()
    assert log.failed(now=0.0) == 0
    lines = []
    for now in range(1, 1200):
        up, down = log.up(), log.failed(now=float(now))
        lines += [now] * up + [now] * (down is not None)
    assert len(lines) <= 2 * (1 + 1200 / LOG_AGAIN_S)
    assert not log.up()
    log.settled()
    assert log.failed(now=1201.0) == 0
    assert log.up()


def test_a_detour_is_told_once_and_a_lasting_one_once_more() -> None:
    log = DetourLog(lasts_s=10.0)
    for began in (0.0, 100.0):  # the second after a return
        told = [(now, log.serves("by b", now=began + now)) for now in range(0, 40, 2)]
        assert [one for one in told if one[1] is not None] == [(0, False), (10, True)]
        assert log.serves("", now=began + 50.0) is None


def test_a_detour_before_an_outage_does_not_age_the_one_after_it() -> None:
    log = DetourLog(lasts_s=10.0)
    assert log.serves("by b", now=0.0) is False
    log.nothing_serves()
    assert log.serves("by b", now=3600.0) is None
    assert log.serves("by b", now=3610.0) is True
    log.nothing_serves()
    assert [log.serves("by b", now=now) for now in (7200.0, 7210.0)] == [None, None]


def test_detours_that_follow_each_other_are_one() -> None:
    log = DetourLog(lasts_s=10.0)
    told = [log.serves(detour, now=now) for detour, now in (("a", 0.0), ("b", 1.0), ("c", 11.0))]
    assert told == [False, False, True]
    assert log.serves("c", now=12.0) is None
