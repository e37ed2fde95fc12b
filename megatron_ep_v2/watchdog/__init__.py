"""Who keeps a dispatch or combine waiting: a record of each rank's calls, and a process beside the rank that reads it.

record.py    the record, in shared memory
watch.py     the rank's side: a buffer that writes its calls down
line.py      the rank's line to the process, and its start
clocks.py    when a call ends, on the host or on a GPU
meeting.py   before a group's first collective: addresses, and who does not come
process.py   the process; it and what it imports need the standard library only
report.py    what a report says
arrivals.py  on demand: who comes last, and by how much
"""
