package bench

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// messageSize is the length of a request and of an answer, in bytes.
const messageSize = 64

// The first byte of a request says what the server shall do.
const (
	askEcho = 'e' // answer, close, and look for the next connection at once
	askMore = 'm' // answer, and wait for the next request on this connection
	askName = 'n' // answer with the address that the request arrived at, close, and go to sleep
	askSink = 's' // read all that comes until the end, close, and go to sleep
	askLast = 'l' // answer, close, and go to sleep: no connection follows soon
)

// maxSamples bounds what a client remembers of one command.
const maxSamples = 1 << 20

// command is what a client is told to do, one JSON object a line.
type command struct {
	// Targets are connected to at random; the same for every connection of a
	// variant that translates.
	Targets []netip.AddrPort `json:"targets"`
	// Operation is what to measure; empty asks for a backend's name only.
	Operation string `json:"operation"`
	// Nanoseconds is how long to measure.
	Nanoseconds int64 `json:"nanoseconds"`
	// WarmUp is how many operations to do before anything is counted.
	WarmUp int `json:"warm_up"`
	// Server is the server's process, whose processor time is counted too.
	Server int `json:"server"`
}

// outcome is what a client answers, one JSON object a line.
type outcome struct {
	// Count is how many operations went well.
	Count  int `json:"count"`
	Errors int `json:"errors"`
	// FirstError is the first of the errors, in words.
	FirstError string `json:"first_error,omitempty"`
	// P50 and P99 are nanoseconds.
	P50 uint32 `json:"p50"`
	P99 uint32 `json:"p99"`
	// CPU is the processor time of client and server, in nanoseconds.
	CPU int64 `json:"cpu"`
	// Backend is the address that answered, where that was asked.
	Backend string `json:"backend,omitempty"`
	// Took is how long all of it took, in nanoseconds, and Pid the process that a worker
	// started; both of DNS.
	Took int64 `json:"took,omitempty"`
	Pid  int   `json:"pid,omitempty"`
}

// WorkerMain is the process of the load generator: a client or a server that
// [Services] starts and talks to over its standard input and output. It ends
// with its standard input, so that none outlives a benchmark that was killed.
// It returns an exit status, for os.Exit.
//
// It makes its system calls raw and on one thread, pinned to one core: the Go
// scheduler takes no part while it measures.
func WorkerMain(args []string) int {
	runtime.LockOSThread()
	if main := dnsWorkers[slices.Concat(args, []string{""})[0]]; main != nil {
		return main(args[1:])
	}
	debug.SetGCPercent(-1) // nothing is allocated while measuring; a cycle would only disturb
	flags := flag.NewFlagSet("bench-worker", flag.ContinueOnError)
	listen := flags.String("listen", "", "serve on this address; without it be the client")
	cpu := flags.Int("cpu", 0, "the processor to stay on")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	err := pin(*cpu)
	if err == nil && *listen != "" {
		err = serve(*listen)
	} else if err == nil {
		err = newClient().run(os.Stdin, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// pin keeps the calling thread on one processor, and makes it a batch task: the
// kernel then never lets the side that was woken interrupt the other one in the
// middle of its work (sched(7)), so that every connection takes the same two
// switches between the processes.
func pin(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to processor %d: %w", cpu, err)
	}
	attributes := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH}
	if err := unix.SchedSetAttr(0, &attributes, 0); err != nil {
		return fmt.Errorf("become a batch task: %w", err)
	}
	return nil
}

// rawAddress is an IPv4 address and port as the kernel takes it.
func rawAddress(address netip.AddrPort) unix.RawSockaddrInet4 {
	raw := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: address.Addr().As4()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&raw.Port))[:], address.Port())
	return raw
}

// client makes connections. All its memory is there before it starts.
type client struct {
	request, answer [messageSize]byte
	samples         []uint32
	random          uint64
}

func newClient() *client {
	return &client{samples: make([]uint32, 0, maxSamples), random: uint64(os.Getpid())*0x9E3779B97F4A7C15 | 1}
}

// run does what it is told until its input ends.
func (c *client) run(in io.Reader, out io.Writer) error {
	commands := bufio.NewScanner(in)
	answers := json.NewEncoder(out)
	if err := answers.Encode(outcome{}); err != nil { // says: ready
		return fmt.Errorf("say ready: %w", err)
	}
	for commands.Scan() {
		var do command
		if err := json.Unmarshal(commands.Bytes(), &do); err != nil {
			return fmt.Errorf("read command %q: %w", commands.Text(), err)
		}
		result := c.perform(do)
		if err := answers.Encode(result); err != nil {
			return fmt.Errorf("write outcome: %w", err)
		}
	}
	return commands.Err()
}

func (c *client) perform(do command) outcome {
	c.samples = c.samples[:0]
	switch do.Operation {
	case Connection:
		return c.measureConnections(do)
	case Request:
		return c.measureRequests(do)
	case Stream:
		return c.measureStream(do)
	case Datagram:
		return c.measureDatagrams(do)
	}
	return c.name(do)
}

// name asks once which backend answers.
func (c *client) name(do command) outcome {
	target := rawAddress(do.Targets[c.draw(len(do.Targets))])
	c.request[0] = askName
	if errno, step := c.connection(&target); step != "" {
		return outcome{Errors: 1, FirstError: describe(errno, step)}
	}
	length := slices.Index(c.answer[:], 0)
	return outcome{Count: 1, Backend: string(c.answer[:max(length, 0)])}
}

// measureConnections makes connections one after another for the time it is
// given.
func (c *client) measureConnections(do command) outcome {
	targets := make([]unix.RawSockaddrInet4, len(do.Targets))
	for i, target := range do.Targets {
		targets[i] = rawAddress(target)
	}
	var result outcome
	c.request[0] = askEcho
	c.repeat(do, &result, func() (unix.Errno, string) {
		return c.connection(&targets[c.draw(len(targets))])
	})
	c.request[0] = askLast
	result.note(c.connection(&targets[0]))
	return result
}

// measureRequests opens one connection and sends requests over it, one after
// another, for the time it is given. A connection that fails is not opened
// again: the requests that were not made count as one error.
func (c *client) measureRequests(do command) outcome {
	target := rawAddress(do.Targets[c.draw(len(do.Targets))])
	var result outcome
	fd, errno, step := open(&target)
	if step != "" {
		result.note(errno, step)
		return result
	}
	result.note(withoutDelay(fd))
	c.request[0] = askMore
	c.repeat(do, &result, func() (unix.Errno, string) { return c.roundTrip(fd) })
	c.request[0] = askLast
	if errno, step = c.roundTrip(fd); step == "" {
		errno, step = toTheEnd(fd)
	}
	result.note(errno, step)
	result.note(closeSocket(fd))
	return result
}

// repeat does an operation until the time is over, and takes its times. It gives
// up at the first error of a request, and after 1,000 of connections.
func (c *client) repeat(do command, result *outcome, operation func() (unix.Errno, string)) {
	patience := 1000
	if do.Operation == Request {
		patience = 1
	}
	for i := 0; i < do.WarmUp && result.Errors == 0; i++ {
		result.note(operation())
	}
	cpu := processTime(0) + processTime(do.Server)
	start := time.Now()
	before := time.Duration(0)
	for before < time.Duration(do.Nanoseconds) && len(c.samples) < cap(c.samples) && result.Errors < patience {
		errno, step := operation()
		after := time.Since(start) // the vDSO's monotonic clock
		if step == "" {
			c.samples = append(c.samples, uint32(min(after-before, 1<<32-1)))
		}
		result.note(errno, step)
		before = after
	}
	result.CPU = processTime(0) + processTime(do.Server) - cpu
	slices.Sort(c.samples)
	result.Count = len(c.samples)
	result.P50, result.P99 = quantile(c.samples, 0.50), quantile(c.samples, 0.99)
}

func (o *outcome) note(errno unix.Errno, step string) {
	if step == "" {
		return
	}
	if o.Errors == 0 {
		o.FirstError = describe(errno, step)
	}
	o.Errors++
}

func describe(errno unix.Errno, step string) string {
	if errno == 0 {
		return step
	}
	return step + ": " + errno.Error()
}

// quantile is the smallest sample that at least the share q of all do not
// exceed (nearest rank); 0 for none.
func quantile(sorted []uint32, q float64) uint32 {
	if len(sorted) == 0 {
		return 0
	}
	rank := int(q*float64(len(sorted)) + 0.9999999)
	return sorted[min(max(rank, 1), len(sorted))-1]
}

// connection makes one connection from socket to close. step is empty if it
// went well, or names what did not; errno is its cause, if the kernel gave one.
func (c *client) connection(target *unix.RawSockaddrInet4) (errno unix.Errno, step string) {
	fd, errno, step := open(target)
	if step != "" {
		return errno, step
	}
	if errno, step = c.roundTrip(fd); step == "" {
		errno, step = toTheEnd(fd)
	}
	if failed, at := closeSocket(fd); step == "" {
		return failed, at
	}
	return errno, step
}

// open makes a connected socket, or none.
func open(target *unix.RawSockaddrInet4) (fd uintptr, errno unix.Errno, step string) {
	fd, _, errno = unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return 0, errno, "socket"
	}
	_, _, errno = unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(target)), unsafe.Sizeof(*target))
	if errno != 0 {
		closeSocket(fd)
		return 0, errno, "connect"
	}
	return fd, 0, ""
}

// roundTrip sends the request and reads the answer.
func (c *client) roundTrip(fd uintptr) (unix.Errno, string) {
	if _, _, errno := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(&c.request)), messageSize); errno != 0 {
		return errno, "write"
	}
	got := uintptr(0)
	for got < messageSize {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&c.answer[got])), messageSize-got)
		if errno != 0 {
			return errno, "read"
		}
		if n == 0 {
			return 0, "read: the answer ended early"
		}
		got += n
	}
	return 0, ""
}

// toTheEnd reads the end of the stream, so that the server closes first.
func toTheEnd(fd uintptr) (unix.Errno, string) {
	var more byte
	n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&more)), 1)
	if errno != 0 || n != 0 {
		return errno, "read to the end"
	}
	return 0, ""
}

func closeSocket(fd uintptr) (unix.Errno, string) {
	if _, _, errno := unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0); errno != 0 {
		return errno, "close"
	}
	return 0, ""
}

// withoutDelay sets TCP_NODELAY, as every client of a request protocol does.
func withoutDelay(fd uintptr) (unix.Errno, string) {
	on := int32(1)
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, uintptr(unsafe.Pointer(&on)), 4, 0)
	if errno != 0 {
		return errno, "set TCP_NODELAY"
	}
	return 0, ""
}

// draw is a random number below n (xorshift64*, S. Vigna, "An experimental
// exploration of Marsaglia's xorshift generators, scrambled", 2016): which
// backend a native connection goes to, as a Service would choose one.
func (c *client) draw(n int) int {
	c.random ^= c.random >> 12
	c.random ^= c.random << 25
	c.random ^= c.random >> 27
	return int((c.random * 0x2545F4914F6CDD1D) >> 33 % uint64(n))
}

// processTime is the processor time in nanoseconds that a process has used, the
// same count as getrusage(2) gives to the microsecond; 0 is this process. On a
// kernel with CONFIG_IRQ_TIME_ACCOUNTING part of the network's work is charged
// to interrupts, for every variant, and is missing here.
func processTime(pid int) int64 {
	clock := int32(unix.CLOCK_PROCESS_CPUTIME_ID)
	if pid != 0 {
		clock = int32(^pid<<3 | 2) // CPUCLOCK_SCHED of a process (clock_getcpuclockid(3))
	}
	var ts unix.Timespec
	if unix.ClockGettime(clock, &ts) != nil {
		return 0
	}
	return ts.Nano()
}

// serve accepts connections one at a time for ever and answers each.
func serve(listen string) error {
	address, err := netip.ParseAddrPort(listen)
	if err != nil {
		return fmt.Errorf("listen on %q: %w", listen, err)
	}
	listener, err := listenOn(address)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", address, err)
	}
	if err := sink(address); err != nil {
		return fmt.Errorf("listen on %s over UDP: %w", address, err)
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with the benchmark
		os.Exit(0)
	}()
	if err := json.NewEncoder(os.Stdout).Encode(outcome{}); err != nil {
		return fmt.Errorf("say ready: %w", err)
	}
	return fmt.Errorf("accept on %s: %w", address, answerAll(listener))
}

// answerAll answers one connection after another until it can accept no more.
// What goes wrong with one of them the client sees and counts.
func answerAll(listener int) unix.Errno {
	asleep := true
	for {
		if asleep {
			// Between the rounds Go must know that this thread waits, or its
			// monitor wakes up a hundred times a second to look after it.
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}, -1)
		}
		fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listener), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		if errno != 0 {
			return errno
		}
		asleep = answer(fd) != askEcho
		closeSocket(fd)
	}
}

// answer answers the requests of one connection and returns what the last asked.
func answer(fd uintptr) byte {
	var message [messageSize]byte
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&message)), messageSize)
		if errno != 0 || n == 0 {
			return askLast // the client went away
		}
		asked := message[0]
		if asked == askName {
			nameOf(int(fd), &message)
		}
		if asked == askSink {
			swallow(fd)
			return askLast
		}
		_, _, errno = unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(&message)), messageSize)
		if asked != askMore || errno != 0 {
			return asked
		}
	}
}

func listenOn(address netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(address.Port()), Addr: address.Addr().As4()}); err != nil {
		return -1, err
	}
	// Sockets that are accepted inherit it.
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return -1, err
	}
	return fd, unix.Listen(fd, 128)
}

// nameOf writes the local address of a connection into message.
func nameOf(fd int, message *[messageSize]byte) {
	*message = [messageSize]byte{}
	local, err := unix.Getsockname(fd)
	if in4, ok := local.(*unix.SockaddrInet4); ok && err == nil {
		copy(message[:messageSize-1], netip.AddrPortFrom(netip.AddrFrom4(in4.Addr), uint16(in4.Port)).String())
	}
}
