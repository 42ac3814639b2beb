# The soak's workloads, run side by side until the time is up. Each checks its own results; a wrong one is reported and
# counted, and the exit status is that count. Runs as root in a Debian tree inside the microVM.

end=$(($(date +%s) + SOAK_SECONDS))
failures=/tmp/failures
: >"$failures"
cpus=$(nproc)

left() { echo $((end - $(date +%s))); }
running() { [ "$(left)" -gt 0 ]; }
# What takes too long on a loaded host is not wrong: it is counted as slow.
say() { echo "HULL {\"soak\":\"$1\",\"rounds\":$2,\"slow\":${3:-0}}"; }
fail() {
	echo "$1" >>"$failures"
	echo "HULL {\"check\":\"soak_$1\",\"ok\":false,\"detail\":\"$(echo "$2" | tr '"\\\n' "'' " | cut -c1-300)\"}"
}

echo 'root:x:0:0::/root:/bin/sh
postgres:x:100:100::/tmp:/bin/sh
redis:x:101:101::/tmp:/bin/sh' >/etc/passwd
echo 'root:x:0:
postgres:x:100:
redis:x:101:' >/etc/group
echo '127.0.0.1 localhost' >/etc/hosts
echo 1 >/proc/sys/vm/overcommit_memory

# stress-ng brings loopback up for nobody: redis listens on a Unix socket only.
redis_keeps_values() {
	redis-server --port 0 --unixsocket /tmp/redis --save '' --daemonize yes --dir /tmp >/dev/null || { fail redis start; return; }
	tries=0
	until redis-cli -s /tmp/redis ping >/dev/null 2>&1; do
		tries=$((tries + 1))
		[ $tries -gt 600 ] && { fail redis 'no answer to PING'; return; }
		sleep 0.2
	done
	rounds=0
	while running; do
		redis-benchmark -s /tmp/redis -n 20000 -c 20 -P 4 -q -t set,get,lpush,lpop,incr >/dev/null 2>&1 || fail redis benchmark
		value=$(head -c 48 /dev/urandom | od -An -tx1 | tr -d ' \n')
		redis-cli -s /tmp/redis set "key$rounds" "$value" >/dev/null
		[ "$(redis-cli -s /tmp/redis get "key$rounds")" = "$value" ] || fail redis "key$rounds lost its value"
		[ "$(redis-cli -s /tmp/redis eval 'local s=0 for i=1,100000 do s=s+i*1.5 end return tostring(s)' 0)" = 7500075000 ] ||
			fail redis 'a wrong sum'
		rounds=$((rounds + 1))
	done
	say redis $rounds
	redis-cli -s /tmp/redis shutdown nosave >/dev/null 2>&1
}

postgres_keeps_its_books() {
	bin=$(echo /usr/lib/postgresql/*/bin)
	as="setpriv --reuid=100 --regid=100 --clear-groups"
	mkdir -p /tmp/pg && chown 100:100 /tmp/pg
	$as "$bin/initdb" -D /tmp/pg/data --no-sync -A trust >/tmp/pg/log 2>&1 || { fail postgres "$(tail -3 /tmp/pg/log)"; return; }
	$as "$bin/pg_ctl" -D /tmp/pg/data -w -t 120 -l /tmp/pg/server-log \
		-o "-c listen_addresses= -c unix_socket_directories=/tmp/pg -c shared_buffers=32MB -c fsync=off" start >/dev/null 2>&1 ||
		{ fail postgres "$(tail -3 /tmp/pg/server-log)"; return; }
	bench="$as env PGHOST=/tmp/pg PGUSER=postgres PGDATABASE=postgres"
	$bench "$bin/pgbench" -i -s 1 -q >/dev/null 2>&1 || { fail postgres initialise; return; }
	rounds=0
	while running; do
		$bench "$bin/pgbench" -c 4 -j 2 -T 5 -n >/tmp/pgbench 2>&1 || fail postgres "$(tail -2 /tmp/pgbench)"
		sums=$($bench "$bin/psql" -Atc 'select (select sum(abalance) from pgbench_accounts) = (select sum(bbalance) from pgbench_branches)
			and (select sum(tbalance) from pgbench_tellers) = (select coalesce(sum(delta), 0) from pgbench_history)
			and (select sum(abalance) from pgbench_accounts) = (select coalesce(sum(delta), 0) from pgbench_history)' 2>/tmp/psql)
		case $sums in
		t) ;;
		f) fail postgres 'the balances differ' ;;
		*) fail postgres "no answer: $(tail -2 /tmp/psql) $(tail -3 /tmp/pg/server-log)" ;;
		esac
		rounds=$((rounds + 1))
	done
	say postgres $rounds
	$as "$bin/pg_ctl" -D /tmp/pg/data -m fast stop >/dev/null 2>&1
}

# One stressor after the other, each with verification where it has one. Status 3 and 4: not possible here, not a failure.
stress_classes() {
	rounds=0 slow=0
	while running; do
		for class in cpu vm signal sigsegv sigfpe sigq sigpipe futex timer timerfd itimer nanosleep clock fork vfork clone exec \
			syscall switch pipe mq sem shm mmap mprotect tlb-shootdown madvise ptrace vecfp vecmath vecwide memcpy matrix \
			fp rseq sockpair poll epoll eventfd getrandom zombie pthread mutex membarrier userfaultfd stack fault \
			hrtimers yield resched funccall qsort crypt prime zlib dentry inotify file-ioctl sysinfo context; do
			running || break
			stress-ng --help 2>/dev/null | grep -qe "--$class N" || continue
			timeout -k 5 60 stress-ng "--$class" $((cpus + 1)) --verify --timeout 3 --oomable --temp-path /tmp \
				--vm-bytes 32m --mmap-bytes 16m --log-brief >/tmp/stress 2>&1
			status=$?
			case $status in
			0 | 3 | 4) ;;
			124 | 137) grep -q 'fail:' /tmp/stress && fail "stress_$class" "$(grep -E 'fail|error' /tmp/stress | head -3)" || slow=$((slow + 1)) ;;
			# Starved of CPU, its children outlive the counter's checksum: on any host, also without a microVM.
			2) [ "$class" = resched ] && grep -q 'hash error' /tmp/stress && slow=$((slow + 1)) ||
				fail "stress_$class" "status $status: $(grep -E 'fail|error' /tmp/stress | head -3)" ;;
			*) fail "stress_$class" "status $status: $(grep -E 'fail|error' /tmp/stress | head -3)" ;;
			esac
			rounds=$((rounds + 1))
		done
	done
	say stress_ng $rounds $slow
}

# Registers across switches and signals, single steps, TLB shootdowns: the isolation guest, as an ordinary process.
registers_and_isolation() {
	rounds=0
	while running; do
		# Slow is not wrong: a round that the end of the soak cuts short counts for nothing.
		CHECK_SECONDS=0 timeout -k 5 $(($(left) + 60)) /isolation >/tmp/isolation 2>&1
		[ $? -eq 124 ] && break
		grep -q '"done":"isolation"' /tmp/isolation || fail isolation 'did not finish'
		grep '"ok":false' /tmp/isolation | sed 's/^HULL //' | while read -r line; do fail isolation "$line"; done
		rounds=$((rounds + 1))
		sleep 1
	done
	say isolation $rounds
}

debugger_steps() {
	rounds=0 slow=0
	while running; do
		timeout -k 5 120 gdb -nx -batch -ex 'set pagination off' -ex 'set disable-randomization off' -ex starti -ex 'stepi 500' \
			-ex 'printf "stepped %d\n", $rip != 0' -ex 'tbreak _exit' -ex continue --args /bin/true >/tmp/gdb 2>&1
		case $? in
		124 | 137) slow=$((slow + 1)) ;;
		*) grep -q '^stepped 1' /tmp/gdb || fail gdb "$(tail -3 /tmp/gdb)" ;;
		esac
		rounds=$((rounds + 1))
	done
	say gdb $rounds $slow
}

process_storm() {
	rounds=0
	while running; do
		count=0
		for _ in 1 2 3 4 5 6 7 8 9 10; do
			total=$(seq 1 200 | mawk '{ sum += $1 } END { print sum }')
			[ "$total" = 20100 ] || fail storm "a pipe of three processes summed to $total"
			count=$((count + 1))
		done
		rounds=$((rounds + 1))
	done
	say process_storm $rounds
}

redis_keeps_values &
postgres_keeps_its_books &
stress_classes &
registers_and_isolation &
debugger_steps &
process_storm &
wait
exit "$(wc -l <"$failures")"
