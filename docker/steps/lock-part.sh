#!/bin/sh
# lock-part.sh only|without NAME... < LOCK: the entries of a hash lock with these names, or all others.
set -eu
how=$1
shift
# An entry is `name==version \` and the indented lines after it. Without comments, which say who else
# needs a package: a part is the same as long as its packages are.
exec awk -v how="$how" -v names=" $* " '
    /^[A-Za-z0-9]/ { name = $0; sub(/[=[ ].*/, "", name); mine = index(names, " " name " ") > 0 }
    /^[ \tA-Za-z0-9]/ && !/^[ \t]*#/ && (how == "only" ? mine : !mine)
'
