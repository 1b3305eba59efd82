"""PURE. The flight recorder: where the time of each request went.

    stages.py         names of stages; `StageClock` measures them in an engine, `StageTime` brings them to the gateway
    timeline.py       `Timeline`: the stages of one answer, as the gateway puts them together, without gaps
    flight.py         `Flight`: one HTTP request under way; makes its record
    records.py        `RequestRecord`, as GET /requests shows it
    flight_log.py     `FlightLog`: the requests under way, and the last ones that ended
    trace_context.py  W3C trace context: the headers of a request, checked

Life of a record: a request has a prompt → `FlightLog.begin` → the gateway and the engines note stages → `FlightLog.end`
keeps the record and gives it to the exporter of spans (tracing/), if there is one.

Clocks of two hosts differ. An engine therefore sends durations only; the gateway places them so that they end when the
chunk that brought them arrives. Every moment between the first byte and the last one belongs to exactly one stage; time
that no stage explains, such as that of messages on their way, is "other".
"""
