package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// dnsWorkers are the workers of DNS by the first word of their arguments.
var dnsWorkers = map[string]func(args []string) int{"dns": dnsStart, "dns-ask": dnsAsk}

// dnsCommand is what a client of DNS is told to do, one JSON object a line.
type dnsCommand struct {
	Operation   string         `json:"operation"`
	Nanoseconds int64          `json:"nanoseconds"`
	Server      netip.AddrPort `json:"server"`
	// Names are asked for in Query and Flood, Name is looked up in the others, by the
	// search list Searches.
	Names    []string `json:"names,omitempty"`
	Name     string   `json:"name"`
	Searches []string `json:"searches,omitempty"`
	// Threads is how many ask in a Flood, Window how many queries each of their sockets
	// has in flight.
	Threads int `json:"threads,omitempty"`
	Window  int `json:"window,omitempty"`
	// Prove has the names whose addresses are to be asked for, once each, and compared.
	Prove map[string]netip.Addr `json:"prove,omitempty"`
}

// tellDNS sends a command and waits for its outcome. What is no client of ours reads a
// line of two words.
func (p *process) tellDNS(do dnsCommand) (outcome, error) {
	if do.Operation == Glibc || do.Operation == Musl {
		return p.say(fmt.Appendf(nil, "%d %s", do.Nanoseconds, do.Name), time.Duration(do.Nanoseconds))
	}
	line, err := json.Marshal(do)
	if err != nil {
		return outcome{}, fmt.Errorf("tell %s: %w", p.what, err)
	}
	return p.say(line, time.Duration(do.Nanoseconds))
}

// dnsStart prepares a process, its processors and its files below /etc, and becomes the
// program that follows "--". With -keep it starts it instead, and ends it when its own
// input ends.
func dnsStart(args []string) int {
	flags := flag.NewFlagSet("dns", flag.ContinueOnError)
	cpus := flags.String("cpus", "0", "the processors to stay on")
	resolver := flags.String("resolver", "", "the file that is /etc/resolv.conf")
	keep := flags.Bool("keep", false, "start the program as a server")
	if err := flags.Parse(args); err != nil || flags.NArg() == 0 {
		return 2
	}
	err := stayOn(*cpus)
	if err == nil && *resolver != "" {
		err = putBelowEtc(*resolver)
	}
	switch {
	case err != nil:
	case *keep:
		err = keepServer(flags.Args())
	default:
		err = unix.Exec(flags.Arg(0), flags.Args(), os.Environ())
		err = fmt.Errorf("start %s: %w", flags.Arg(0), err)
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// stayOn keeps the calling thread, and what it becomes or starts, on some processors.
func stayOn(cpus string) error {
	var set unix.CPUSet
	for text := range strings.SplitSeq(cpus, ",") {
		cpu, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("processors %q: %w", cpus, err)
		}
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("stay on processors %s: %w", cpus, err)
	}
	return nil
}

// The other files of a pod, which lie beside its resolv.conf.
const (
	switchFile = "nsswitch.conf"
	hostsFile  = "hosts.conf"
)

// putBelowEtc puts a pod's files over those of the host, for this thread alone and what it
// becomes. What caches for the C library (nscd(8)) is hidden.
func putBelowEtc(resolver string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for to, from := range map[string]string{"resolv.conf": filepath.Base(resolver), "nsswitch.conf": switchFile, "hosts": hostsFile} {
		to = filepath.Join("/etc", to)
		if _, err := os.Stat(to); err != nil && filepath.Base(to) != "resolv.conf" {
			continue
		}
		if err := unix.Mount(filepath.Join(filepath.Dir(resolver), from), to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("put %s over %s: %w", from, to, err)
		}
	}
	if _, err := os.Stat("/run/nscd"); err == nil {
		if err := unix.Mount("tmpfs", "/run/nscd", "tmpfs", 0, ""); err != nil {
			return fmt.Errorf("hide /run/nscd: %w", err)
		}
	}
	return nil
}

// keepServer runs a server for as long as the benchmark wants it.
func keepServer(program []string) error {
	c := exec.Command(program[0], program[1:]...)
	c.Stdout, c.Stderr = os.Stderr, os.Stderr
	// Of this thread, which stays: it is the process's first.
	c.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := c.Start(); err != nil {
		return fmt.Errorf("start %s: %w", program[0], err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(outcome{Pid: c.Process.Pid}); err != nil {
		return fmt.Errorf("say ready: %w", err)
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with the benchmark
		os.Exit(0)
	}()
	_ = c.Wait() // the state says how it ended
	return fmt.Errorf("%s ended: %s", program[0], c.ProcessState)
}

// dnsAsk is a client of DNS: it does what it is told until its input ends.
func dnsAsk([]string) int {
	if err := askAll(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func askAll(in io.Reader, out io.Writer) error {
	debug.SetGCPercent(-1) // but for what Go's own resolver allocates
	commands := bufio.NewReader(in)
	answers := json.NewEncoder(out)
	samples := make([]uint32, 0, maxSamples)
	if err := answers.Encode(outcome{}); err != nil { // says: ready
		return fmt.Errorf("say ready: %w", err)
	}
	for {
		line, err := commands.ReadBytes('\n')
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		var do dnsCommand
		if err := json.Unmarshal(line, &do); err != nil {
			return fmt.Errorf("read command %q: %w", line, err)
		}
		result, err := do.perform(samples)
		if err != nil {
			result.Errors, result.FirstError = result.Errors+1, err.Error()
		}
		if err := answers.Encode(result); err != nil {
			return fmt.Errorf("write outcome: %w", err)
		}
	}
}

func (do *dnsCommand) perform(samples []uint32) (outcome, error) {
	if do.Prove != nil {
		return do.prove()
	}
	switch do.Operation {
	case Query:
		return do.oneByOne(samples)
	case Flood:
		return do.flood()
	case Pairs:
		return do.repeat(samples, do.pairs)
	case Go:
		return do.goResolver(samples)
	}
	return outcome{}, fmt.Errorf("no client does %q", do.Operation)
}

// repeat does something until the time is over, and takes its times.
func (do *dnsCommand) repeat(samples []uint32, what func() error) (result outcome, err error) {
	cpu, start, before := processTime(0), time.Now(), time.Duration(0)
	for before < time.Duration(do.Nanoseconds) && len(samples) < cap(samples) {
		failed := what()
		after := time.Since(start)
		if failed == nil {
			samples = append(samples, uint32(min(after-before, 1<<32-1)))
		} else if result.Errors++; result.Errors == 1 {
			result.FirstError = failed.Error()
		}
		before = after
	}
	result.CPU, result.Took, result.Count = processTime(0)-cpu, int64(before), len(samples)
	slices.Sort(samples)
	result.P50, result.P99 = quantile(samples, 0.5), quantile(samples, 0.99)
	return result, nil
}

// goResolver looks a name up as a program in Go does, on threads that are Go's to choose.
func (do *dnsCommand) goResolver(samples []uint32) (result outcome, err error) {
	debug.SetGCPercent(100)
	defer debug.SetGCPercent(-1)
	resolver := net.Resolver{PreferGo: true}
	done := make(chan struct{})
	go func() {
		defer close(done)
		result, err = do.repeat(samples, func() error {
			_, err := resolver.LookupNetIP(context.Background(), "ip", do.Name)
			return err
		})
	}()
	<-done
	return result, err
}

// questions are queries for names, as they are sent.
func (do *dnsCommand) questions(kind uint16) (all [][]byte) {
	for i, name := range do.Names {
		all = append(all, appendQuestion(nil, uint16(i), name, kind))
	}
	return all
}

// dial opens a socket that is connected to the server.
func (do *dnsCommand) dial(flags int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|flags, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(do.Server.Port()), Addr: do.Server.Addr().As4()}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to %s: %w", do.Server, err)
	}
	return fd, nil
}

// answerTime is how long an answer may take, as in resolv.conf(5).
const answerTime = 5 * time.Second

// socket is one that waits for answers so long.
func (do *dnsCommand) socket() (int, error) {
	fd, err := do.dial(0)
	if err != nil {
		return -1, err
	}
	wait := unix.NsecToTimeval(answerTime.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("set a time limit: %w", err)
	}
	return fd, nil
}

// ask sends a query and reads its answer; a late one to an earlier query is passed over.
func ask(fd int, query, answer []byte) ([]byte, error) {
	if _, err := unix.Write(fd, query); err != nil {
		return nil, fmt.Errorf("send: %w", err)
	}
	for {
		n, err := unix.Read(fd, answer)
		if err != nil {
			return nil, fmt.Errorf("receive: %w", err)
		}
		if n >= headerSize && answer[0] == query[0] && answer[1] == query[1] {
			return answer[:n], nil
		}
	}
}

// isFound says whether an answer has records.
func isFound(answer []byte) bool {
	return len(answer) >= headerSize && answer[2]&0x80 != 0 && answer[3]&0x0f == 0 && answer[6]|answer[7] != 0
}

// prove asks for each name and compares the address.
func (do *dnsCommand) prove() (result outcome, err error) {
	fd, err := do.socket()
	if err != nil {
		return result, err
	}
	defer unix.Close(fd)
	answer := make([]byte, 1500)
	for name, want := range do.Prove {
		said, err := ask(fd, appendQuestion(nil, uint16(result.Count), name, typeA), answer)
		if err != nil {
			return result, fmt.Errorf("%s: %w", name, err)
		}
		if got, ok := netip.AddrFromSlice(said[max(len(said)-4, 0):]); !isFound(said) || !ok || got != want {
			return result, fmt.Errorf("%s is answered with %x, not with %s", name, said, want)
		}
		result.Count++
	}
	return result, nil
}

// oneByOne has one query in flight.
func (do *dnsCommand) oneByOne(samples []uint32) (result outcome, err error) {
	fd, err := do.socket()
	if err != nil {
		return result, err
	}
	defer unix.Close(fd)
	questions, answer, turn := do.questions(typeA), make([]byte, 1500), 0
	return do.repeat(samples, func() error {
		turn++
		said, err := ask(fd, questions[turn%len(questions)], answer)
		if err == nil && !isFound(said) {
			err = fmt.Errorf("%s is not found", do.Names[turn%len(questions)])
		}
		return err
	})
}
