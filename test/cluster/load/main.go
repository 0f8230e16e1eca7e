// Load is what a Service is asked for while somebody changes who serves it: new and
// long-lived connections, questions by connected and unconnected sockets, each with
// a deadline of its own, and none tried again.
//
//	load serve                   answers with what it is sent, TCP and UDP, port 9000
//	load once ADDRESS:PORT ...   asks each in each way, and fails if one does not answer
//	load call ADDRESS:PORT ...   asks each until its standard input ends
//	load call --on ADDRESS ...   likewise, for ever
//
// It changes nothing. What it says is read by the test beside it: a line each second
// for each kind of operation, "MILLISECONDS KIND DONE", and "! MILLISECONDS KIND
// ADDRESS: ERROR" for each that failed, with when it was begun.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

const (
	port     = ":9000"
	deadline = 2 * time.Second
	every    = 250 * time.Millisecond
	visit    = 8 * time.Second
	forEver  = 1 << 62
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: load serve | load once ADDRESS:PORT ... | load call [--on] ADDRESS:PORT ...")
		os.Exit(2)
	}
	if os.Args[1] == "serve" {
		fmt.Fprintln(os.Stderr, "load:", serve())
		os.Exit(1)
	}
	targets := os.Args[2:]
	if os.Args[1] == "once" {
		if err := once(targets); err != nil {
			fmt.Fprintln(os.Stderr, "load:", err)
			os.Exit(1)
		}
		return
	}
	ctx, end := context.WithCancel(context.Background())
	if len(targets) > 0 && targets[0] == "--on" {
		targets = targets[1:]
	} else {
		go func() {
			io.Copy(io.Discard, os.Stdin)
			end()
		}()
	}
	call(ctx, targets)
}

// serve returns when it cannot go on.
func serve() error {
	datagrams, err := net.ListenPacket("udp", port)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", port)
	if err != nil {
		return err
	}
	go func() {
		buffer := make([]byte, 2048)
		for {
			n, from, err := datagrams.ReadFrom(buffer)
			if err == nil {
				datagrams.WriteTo(buffer[:n], from)
			}
		}
	}()
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			io.Copy(conn, conn)
		}()
	}
}

// kind is a way to ask.
type kind struct {
	name string
	dial func(target netip.AddrPort, until time.Time) (net.Conn, error)
	life time.Duration // of a connection or socket; 0: one question each
}

var kinds = []kind{
	{"tcp-new", connect("tcp"), 0},
	{"tcp-visit", connect("tcp"), visit},
	{"tcp-long", connect("tcp"), forEver},
	{"udp-new", connect("udp"), 0},
	{"udp-connected", connect("udp"), forEver},
	{"udp-unconnected", unconnected, forEver},
}

func connect(network string) func(netip.AddrPort, time.Time) (net.Conn, error) {
	return func(target netip.AddrPort, until time.Time) (net.Conn, error) {
		dialer := net.Dialer{Deadline: until}
		return dialer.Dial(network, target.String())
	}
}

// addressed is a socket that sends without connecting: its answers have to come from
// whom it asked.
type addressed struct {
	*net.UDPConn
	to netip.AddrPort
}

func unconnected(target netip.AddrPort, _ time.Time) (net.Conn, error) {
	family := "udp4"
	if target.Addr().Is6() {
		family = "udp6"
	}
	conn, err := net.ListenUDP(family, nil)
	return addressed{conn, target}, err
}

func (a addressed) Write(b []byte) (int, error) { return a.WriteToUDPAddrPort(b, a.to) }

func (a addressed) Read(b []byte) (int, error) {
	n, from, err := a.ReadFromUDPAddrPort(b)
	if from := netip.AddrPortFrom(from.Addr().Unmap(), from.Port()); err == nil && from != a.to {
		err = fmt.Errorf("the answer comes from %v", from)
	}
	return n, err
}

// once asks every target in every way, one after the other.
func once(targets []string) error {
	for _, text := range targets {
		for _, k := range kinds {
			until := time.Now().Add(deadline)
			conn, err := k.dial(netip.MustParseAddrPort(text), until)
			if err == nil {
				err = exchange(conn, until)
				conn.Close()
			}
			if err != nil {
				return fmt.Errorf("%s %s: %w", k.name, text, err)
			}
		}
	}
	return nil
}

// call asks every target in every way, until ctx ends.
func call(ctx context.Context, targets []string) {
	var all sync.WaitGroup
	said := newTally()
	for _, text := range targets {
		target := netip.MustParseAddrPort(text)
		for i, k := range kinds {
			all.Go(func() {
				time.Sleep(every * time.Duration(i) / time.Duration(len(kinds)))
				for tick := time.NewTicker(every); ctx.Err() == nil; {
					k.ask(ctx, target, tick.C, said)
				}
			})
		}
	}
	all.Go(func() { said.print(ctx) })
	all.Wait()
}

// ask opens one connection and asks by it, once in each tick, until its life is over
// or an answer fails to come.
func (k kind) ask(ctx context.Context, target netip.AddrPort, tick <-chan time.Time, said *tally) {
	opened := <-tick
	begun := time.Now()
	conn, err := k.dial(target, begun.Add(deadline))
	if err != nil {
		said.add(k.name, target, begun, err)
		return
	}
	defer conn.Close()
	for {
		err := exchange(conn, begun.Add(deadline))
		said.add(k.name, target, begun, err)
		if err != nil || ctx.Err() != nil || time.Since(opened) >= k.life {
			return
		}
		<-tick
		begun = time.Now()
	}
}

// exchange sends what nobody has sent before, and wants it back.
func exchange(conn net.Conn, until time.Time) error {
	var question, answer [16]byte
	rand.Read(question[:])
	if err := conn.SetDeadline(until); err != nil {
		return err
	}
	if _, err := conn.Write(question[:]); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return err
	}
	if question != answer {
		return errors.New("the answer is another's")
	}
	return nil
}

// tally counts operations, and says those that failed at once.
type tally struct {
	mu   sync.Mutex
	done map[string]int
}

func newTally() *tally { return &tally{done: map[string]int{}} }

func (t *tally) add(kind string, target netip.AddrPort, begun time.Time, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done[kind]++
	if err != nil {
		fmt.Printf("! %d %s %s: %v\n", begun.UnixMilli(), kind, target, err)
	}
}

// print says each second what was done in it.
func (t *tally) print(ctx context.Context) {
	for ended := false; !ended; {
		select {
		case <-ctx.Done():
			ended = true
			time.Sleep(deadline + every) // for what is under way
		case <-time.After(time.Second):
		}
		t.mu.Lock()
		for kind, n := range t.done {
			fmt.Printf("%d %s %d\n", time.Now().UnixMilli(), kind, n)
		}
		clear(t.done)
		t.mu.Unlock()
	}
}
