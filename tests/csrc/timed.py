"""Runs a compiler and notes how much CPU time it took: how long that lasts depends on who else compiles.

Arguments: the file to note it in, the command.
"""

import resource
import subprocess
import sys

notes, *command = sys.argv[1:]
done = subprocess.run(command)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
source = next((word for word in reversed(command) if word.endswith(".cu")), "")
with open(notes, "a") as file:
    file.write(f"{source} {used.ru_utime + used.ru_stime:.1f}\n")
sys.exit(done.returncode)
