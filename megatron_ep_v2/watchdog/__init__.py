"""The watchdog names the rank that a dispatch or combine waits for. Each rank logs its calls; a process reads the log.

call_log.py        the log of a rank's calls, in shared memory
watched_buffer.py  the rank's side: a buffer that logs its calls
client.py          starts the rank's watcher, and is the rank's end of the connection to it
completion.py      detects when a call ends, on the host or on a GPU
rendezvous.py      before a group's first collective: exchanges addresses, and names ranks that do not arrive
watcher.py         the watcher process; it and its imports need the standard library only
report.py          the text of a report
stragglers.py      on demand: which rank arrives last, and how late
"""
