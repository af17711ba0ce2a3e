from edgesync.io.outage_log import LOG_AGAIN_S, OutageLog


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
