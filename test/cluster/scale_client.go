package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"
)

// serveEndpoints answers at every endpoint's address with that address.
func serveEndpoints() error {
	listener, err := net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", endpointPort))
	if err != nil {
		return err
	}
	fmt.Println("listens")
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer connection.Close()
			at := connection.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().As4()
			_, err := connection.Write(at[:])
			if err == nil {
				// The client ends it, with a reset: nothing stays in TIME_WAIT, and
				// for 10 s only in a conntrack table.
				_, _ = connection.Read(make([]byte, 1))
			}
		}()
	}
}

// dial calls a Service once, and returns of which generation who answered is.
func dial(service int, limit time.Duration) (generation int, err error) {
	dialer := net.Dialer{Timeout: limit, KeepAlive: -1}
	connection, err := dialer.Dial("tcp4", netip.AddrPortFrom(clusterIP(service), servicePort).String())
	if err != nil {
		return 0, err
	}
	defer connection.Close()
	if err := errors.Join(connection.(*net.TCPConn).SetLinger(0), connection.SetDeadline(time.Now().Add(time.Second))); err != nil {
		return 0, err
	}
	var answer [4]byte
	if _, err := io.ReadFull(connection, answer[:]); err != nil {
		return 0, err
	}
	who, generation := whose(netip.AddrFrom4(answer))
	if who != service {
		return 0, fmt.Errorf("%s of Service %d answered for Service %d", netip.AddrFrom4(answer), who, service)
	}
	return generation, nil
}

// callServices does what is asked for, line by line:
//
//	all 10000    returns when each Service has answered
//	until 17 3   calls Service 17 until generation 3 answers; "ready" is said before,
//	             when the one before it has answered
//
// It answers with when that was, in nanoseconds, and how many calls it took.
func callServices() error {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var service, generation int
		if _, err := fmt.Sscanf(lines.Text(), "all %d", &service); err == nil {
			at, late := callAll(service)
			fmt.Println(at.UnixNano(), late)
			continue
		}
		if _, err := fmt.Sscanf(lines.Text(), "until %d %d", &service, &generation); err != nil {
			return fmt.Errorf("asked for %q: %w", lines.Text(), err)
		}
		if err := callUntil(service, (generation+generations-1)%generations, time.Now().Add(longest), func() {}); err != nil {
			return err
		}
		fmt.Println("ready")
		calls := 0
		if err := callUntil(service, generation, time.Now().Add(longest), func() { calls++ }); err != nil {
			return err
		}
		fmt.Println(time.Now().UnixNano(), calls)
	}
	return lines.Err()
}

// longest is how long anything may take to be served.
const longest = 10 * time.Minute

// between two calls: what they cost shall not be what is measured.
const between = 200 * time.Microsecond

func callUntil(service, wanted int, deadline time.Time, count func()) error {
	for {
		count()
		generation, err := dial(service, 100*time.Millisecond)
		if err == nil && generation == wanted {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("Service %d does not lead to generation %d in %v: last %d, %v", service, wanted, longest, generation, err)
		}
		time.Sleep(between)
	}
}

// callAll returns when all Services were served: when the last of 20 among them
// answered first, or, if any of all does not answer right then, when the last of
// those did. late is how many those were.
func callAll(services int) (at time.Time, late int64) {
	var some, all sync.WaitGroup
	var last, failed atomic.Int64
	answered := func(service int) {
		for {
			if _, err := dial(service, 20*time.Millisecond); err == nil {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		now := time.Now().UnixNano()
		for old := last.Load(); now > old && !last.CompareAndSwap(old, now); old = last.Load() {
		}
	}
	for i := range 20 {
		some.Go(func() { answered((services - 1) * i / 19) })
	}
	some.Wait()
	for worker := range 4 {
		all.Go(func() {
			for service := worker; service < services; service += 4 {
				if _, err := dial(service, time.Second); err != nil {
					failed.Add(1)
					answered(service)
				}
			}
		})
	}
	all.Wait()
	return time.Unix(0, last.Load()), failed.Load()
}

// asker is the process of callServices, in the client's namespace and cgroup.
type asker struct {
	command *exec.Cmd
	ask     io.Writer
	answers *bufio.Reader
}

func startAsker() (*asker, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	node, _, err := scaleGroups()
	if err != nil {
		return nil, err
	}
	command := in(scaleClient, []string{node + "/pods"}, self, "scale-client")
	ask, err := command.StdinPipe()
	if err != nil {
		return nil, err
	}
	answers, err := command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	_, err = launch(command, "client")
	return &asker{command, ask, bufio.NewReader(answers)}, err
}

// say something to the process, and read its answer into values.
func (c *asker) say(line string, values ...any) error {
	if line != "" {
		if _, err := fmt.Fprintln(c.ask, line); err != nil {
			return fmt.Errorf("ask the client to %s: %w", line, err)
		}
	}
	answer, err := c.answers.ReadString('\n')
	if err == nil {
		_, err = fmt.Sscan(answer, values...)
	}
	if err != nil {
		return fmt.Errorf("ask the client to %s: %w: %s", line, err, endOfLog("client"))
	}
	return nil
}

// end the process: it may be waiting for what never comes.
func (c *asker) end() { _ = c.command.Process.Kill() }

// all is when all Services were served, and how many of them late.
func (c *asker) all(services int) (at time.Time, late int, err error) {
	var nanoseconds int64
	err = c.say(fmt.Sprintf("all %d", services), &nanoseconds, &late)
	return time.Unix(0, nanoseconds), late, err
}

// until calls a Service, lets change change its endpoints, and returns when a call
// arrived at the new ones.
func (c *asker) until(service, generation int, change func() error) (time.Time, error) {
	var word string
	var nanoseconds int64
	var calls int
	if err := c.say(fmt.Sprintf("until %d %d", service, generation), &word); err != nil {
		return time.Time{}, err
	}
	if err := change(); err != nil {
		return time.Time{}, err
	}
	err := c.say("", &nanoseconds, &calls)
	return time.Unix(0, nanoseconds), err
}
