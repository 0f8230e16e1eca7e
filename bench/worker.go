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
	askEcho = 'e' // answer, and look for the next connection at once
	askName = 'n' // answer with the address that the request arrived at, and go to sleep
	askLast = 'l' // answer, and go to sleep: no connection follows soon
)

// maxSamples bounds what a client remembers of one command.
const maxSamples = 1 << 20

// command is what a client is told to do, one JSON object a line.
type command struct {
	// Targets are connected to at random; the same for every connection of a
	// variant that translates.
	Targets []netip.AddrPort `json:"targets"`
	// Nanoseconds is how long to measure. 0 asks for the backend's name only.
	Nanoseconds int64 `json:"nanoseconds"`
	// First forgets what earlier commands measured, Last asks for the quantiles
	// of everything since the First.
	First bool `json:"first"`
	Last  bool `json:"last"`
	// WarmUp is how many connections to make before anything is counted.
	WarmUp int `json:"warm_up"`
	// Server is the server's process, whose processor time is counted too.
	Server int `json:"server"`
}

// outcome is what a client answers, one JSON object a line.
type outcome struct {
	Connections int `json:"connections"`
	Errors      int `json:"errors"`
	// FirstError is the first of the errors, in words.
	FirstError string `json:"first_error,omitempty"`
	// P50 and P99 are nanoseconds, 0 before the last command of a turn.
	P50 uint32 `json:"p50"`
	P99 uint32 `json:"p99"`
	// CPU is the processor time of client and server, in nanoseconds.
	CPU int64 `json:"cpu"`
	// Backend is the address that answered, where that was asked.
	Backend string `json:"backend,omitempty"`
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
		result := c.name(do)
		if do.Nanoseconds > 0 {
			result = c.measure(do)
		}
		if err := answers.Encode(result); err != nil {
			return fmt.Errorf("write outcome: %w", err)
		}
	}
	return commands.Err()
}

// name asks once which backend answers.
func (c *client) name(do command) outcome {
	target := rawAddress(do.Targets[c.draw(len(do.Targets))])
	c.request[0] = askName
	if errno, step := c.connection(&target); step != "" {
		return outcome{Errors: 1, FirstError: describe(errno, step)}
	}
	length := slices.Index(c.answer[:], 0)
	return outcome{Connections: 1, Backend: string(c.answer[:max(length, 0)])}
}

// measure makes connections one after another for the time it is given.
func (c *client) measure(do command) outcome {
	targets := make([]unix.RawSockaddrInet4, len(do.Targets))
	for i, target := range do.Targets {
		targets[i] = rawAddress(target)
	}
	if do.First {
		c.samples = c.samples[:0]
	}
	had := len(c.samples)
	c.request[0] = askEcho
	var result outcome
	for i := 0; i < do.WarmUp && result.Errors == 0; i++ {
		result.note(c.connection(&targets[c.draw(len(targets))]))
	}
	cpu := processTime(0) + processTime(do.Server)
	start := time.Now()
	before := time.Duration(0)
	for before < time.Duration(do.Nanoseconds) && len(c.samples) < cap(c.samples) && result.Errors < 1000 {
		errno, step := c.connection(&targets[c.draw(len(targets))])
		after := time.Since(start) // the vDSO's monotonic clock
		if step == "" {
			c.samples = append(c.samples, uint32(min(after-before, 1<<32-1)))
		}
		result.note(errno, step)
		before = after
	}
	result.CPU = processTime(0) + processTime(do.Server) - cpu
	c.request[0] = askLast
	result.note(c.connection(&targets[0]))
	result.Connections = len(c.samples) - had
	if do.Last {
		slices.Sort(c.samples)
		result.P50, result.P99 = quantile(c.samples, 0.50), quantile(c.samples, 0.99)
	}
	return result
}

// add brings the outcome of one more command into that of a turn. The
// quantiles are those of the last one, which knows all samples.
func (o *outcome) add(more outcome) {
	o.Connections += more.Connections
	o.Errors += more.Errors
	o.CPU += more.CPU
	o.P50, o.P99 = more.P50, more.P99
	if o.FirstError == "" {
		o.FirstError = more.FirstError
	}
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
	fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return errno, "socket"
	}
	errno, step = c.exchange(fd, target)
	if _, _, failed := unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0); failed != 0 && step == "" {
		return failed, "close"
	}
	return errno, step
}

func (c *client) exchange(fd uintptr, target *unix.RawSockaddrInet4) (unix.Errno, string) {
	if _, _, errno := unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(target)), unsafe.Sizeof(*target)); errno != 0 {
		return errno, "connect"
	}
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
	var more byte
	n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&more)), 1)
	if errno != 0 || n != 0 {
		return errno, "read to the end"
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
	var message [messageSize]byte
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
		_, _, errno = unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&message)), messageSize)
		asleep = message[0] != askEcho
		if message[0] == askName {
			nameOf(int(fd), &message)
		}
		if errno == 0 {
			_, _, _ = unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(&message)), messageSize)
		}
		_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
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
