# What a guest checks of several processors. Runs in the guest as /script; each case prints "check: NAME ok"
# or "check: NAME FAILED", and the host reads that (tests/guest/smp.py, which puts CPUS=, SOCKETS= and
# CORES= before it, the latter of all sockets together).

check() {
    if [ "$2" = "$3" ]; then
        echo "check: $1 ok"
    else
        echo "check: $1 FAILED: got '$2', want '$3'"
    fi
}
cpu=/sys/devices/system/cpu
last=$((CPUS - 1))

check processors "$(nproc)" "$CPUS"
check online "$(cat $cpu/online)" "0-$last"
check sockets "$(cat $cpu/cpu*/topology/physical_package_id | sort -u | wc -l)" "$SOCKETS"
check cores "$(for c in $cpu/cpu[0-9]*/topology; do
        echo "$(cat "$c/physical_package_id") $(cat "$c/core_id")"
    done | sort -u | wc -l)" "$CORES"
check threads "$(cat $cpu/cpu*/topology/thread_siblings_list | sort -u | wc -l)" "$CORES"

# The same work on all at once, each pinned to a processor of its own.
work() {
    seq 1 20000 | sha256sum | cut -c1-8
}
check work-on-each "$(for n in $(seq 0 $last); do
        (taskset -p $(printf %x $((1 << n))) $$ >/dev/null; work) &
    done | sort | uniq -c | tr -s ' '; wait)" " $CPUS f6351f5e"
check work-by-all "$(for n in $(seq 1 $((4 * CPUS))); do work & done | sort | uniq -c | tr -s ' '; wait)" \
    " $((4 * CPUS)) f6351f5e"
for n in $(seq 0 $last); do
    awk -v n="$n" -v key="cpu$n" '$1 == key && $2 + $4 > 0 { exit 1 }' /proc/stat && echo "idle: $n"
done >/tmp/idle
check all-worked "$(cat /tmp/idle)" ""

# Between processors: pipes, and processes that come and go.
check pipes "$(seq 1 30000 | sort -rn | sort -n | tac | sort -n | tail -n 1)" 30000
check processes "$(for n in $(seq 1 60); do (true | cat; echo "$n") & done | wc -l; wait)" 60

# Threads that wait for each other, signals, timers, processes that execute another program.
result() {
    parallel "$1" "$2" "$3" | cut -d ' ' -f 4
}
check compute "$(result compute $((2 * CPUS)) 64)" "$(result compute 1 64)"
check pipe "$(result pipe 2 2000)" 1024032768
check trips "$(result trips 2 500)" 62530
check futex "$(result futex $((2 * CPUS)) 4096)" 1
check fork "$(result fork "$CPUS" 200)" 9900
check exec "$(result exec "$CPUS" 100)" 100
check signal "$(result signal "$CPUS" 960)" 1
check timers "$(result timers $((2 * CPUS)) 200)" 200

# Processors go and come back, while there is work.
(while [ ! -e /tmp/stop ]; do work; done >/tmp/works) &
for round in 1 2 3; do
    for n in $(seq 1 $last); do
        echo 0 >$cpu/cpu"$n"/online
    done
    check "offline-$round" "$(cat $cpu/online)" 0
    for n in $(seq 1 $last); do
        echo 1 >$cpu/cpu"$n"/online
    done
    check "online-$round" "$(cat $cpu/online)" "0-$last"
done
touch /tmp/stop
wait
check work-meanwhile "$(sort -u /tmp/works)" f6351f5e
check work-afterwards "$(taskset $(printf %x $((1 << last))) sh -c 'seq 1 20000 | sha256sum | cut -c1-8')" f6351f5e

check interrupts "$(awk '/LOC:/ { for (n = 2; n < 2 + cpus; n++) if ($n == 0) print "none at " n - 2 }' \
    cpus="$CPUS" /proc/interrupts)" ""
check kernel-log \
    "$(dmesg | grep -E 'WARNING:|BUG|Call Trace|Oops|detected stall|self-detected|soft lockup|hard LOCKUP|[Uu]nstable|hung|do_boot_cpu failed' | head -n 3)" ""
exit 0
