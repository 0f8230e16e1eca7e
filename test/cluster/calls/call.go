package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
)

// Failure is a call that failed.
type Failure struct {
	At     time.Time `json:"at"` // when it began
	MS     int64     `json:"ms"` // how long it took
	Target string    `json:"target"`
	Kind   string    `json:"kind"`
	To     string    `json:"to"`
	// Endpoint is where the socket was connected to, if that can be seen.
	Endpoint string `json:"endpoint,omitempty"`
	// Server answered last on this socket.
	Server string `json:"server,omitempty"`
	Error  string `json:"error"`
}

// Second is what happened since the last one.
type Second struct {
	At     time.Time `json:"at"`
	Asked  int       `json:"asked"`
	Failed int       `json:"failed"`
	// SilentMS is how long Silent has had no answer.
	SilentMS int64  `json:"silent_ms"`
	Silent   string `json:"silent"`
}

// target is called again and again, by one goroutine.
type target struct {
	name, kind string
	to         netip.AddrPort
	line       *line
	every      time.Duration
	deadline   time.Duration
	socket     *socket
	server     string
	number     int
	answered   time.Time // guarded by line
}

// line collects what targets have to say.
type line struct {
	sync.Mutex
	out           *json.Encoder
	asked, failed int
	targets       []*target
}

func call(arguments []string) error {
	flags := flag.NewFlagSet("call", flag.ExitOnError)
	every := flags.Duration("every", time.Second, "the time between two requests of a target")
	deadline := flags.Duration("deadline", 5*time.Second, "how long an answer is waited for")
	patience := flags.Duration("patience", 75*time.Second, "the same, of tcp-long")
	count := flags.Int("count", 0, "how many requests for each target; 0 for no end")
	stdin := flags.Bool("stdin", false, "end with the standard input")
	_ = flags.Parse(arguments) // ExitOnError: it does not return one
	l := &line{out: json.NewEncoder(os.Stdout)}
	for _, argument := range flags.Args() {
		t, err := parse(argument)
		if err != nil {
			return err
		}
		t.line, t.every, t.deadline, t.answered = l, *every, *deadline, time.Now()
		if t.kind == "tcp-long" {
			t.deadline = *patience
		}
		l.targets = append(l.targets, t)
	}
	var all sync.WaitGroup
	for i, t := range l.targets {
		all.Go(func() {
			time.Sleep(*every * time.Duration(i) / time.Duration(len(l.targets))) // not all at once
			t.run(*count)
		})
	}
	ctx, end := context.WithCancel(context.Background())
	go func() { all.Wait(); end() }()
	if *stdin {
		go func() { _, _ = io.Copy(io.Discard, os.Stdin); end() }()
	}
	l.speak(ctx)
	return nil
}

func parse(argument string) (*target, error) {
	name, address, _ := strings.Cut(argument, "=")
	name, kind, _ := strings.Cut(name, "/")
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("%s: NAME/KIND=ADDRESS:PORT is wanted: %w", argument, err)
	}
	switch kind {
	case "tcp", "tcp-long", "udp", "udp-long":
		return &target{name: name, kind: kind, to: to}, nil
	}
	return nil, fmt.Errorf("%s: there is no kind %q", argument, kind)
}

// speak says each second what happened in it, until the end.
func (l *line) speak(ctx context.Context) {
	for tick := time.NewTicker(time.Second); ; {
		select {
		case <-ctx.Done():
			l.second()
			return
		case <-tick.C:
			l.second()
		}
	}
}

func (l *line) second() {
	l.Lock()
	defer l.Unlock()
	now := time.Now()
	s := Second{At: now, Asked: l.asked, Failed: l.failed}
	l.asked, l.failed = 0, 0
	for _, t := range l.targets {
		if silent := now.Sub(t.answered).Milliseconds(); silent >= s.SilentMS {
			s.SilentMS, s.Silent = silent, t.name+"/"+t.kind+"="+t.to.String()
		}
	}
	_ = l.out.Encode(s) // nobody listens any more
}

func (t *target) run(count int) {
	for n := 0; count == 0 || n < count; n++ {
		begun := time.Now()
		err := t.ask(begun.Add(t.deadline))
		t.tell(begun, err)
		if err != nil {
			t.part(err)
		}
		if t.kind == "tcp" {
			t.end()
		}
		time.Sleep(t.every - time.Since(begun))
	}
}

// errNoAnswer says that the deadline passed.
var errNoAnswer = errors.New("no answer")

// ask sends one request and reads its answer, with a socket if there is none yet.
func (t *target) ask(until time.Time) error {
	if t.socket == nil {
		s, err := open(t.kind, t.to)
		if err != nil {
			return err
		}
		t.socket = s
		if err := s.connect(until); err != nil {
			return fmt.Errorf("connect: %w", err)
		}
	}
	t.number++
	request := fmt.Sprintf("%d\n", t.number)
	if err := t.socket.send([]byte(request)); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	for {
		answer, err := t.socket.receive(until)
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		fields := strings.Fields(string(answer))
		if len(fields) < 2 {
			return fmt.Errorf("receive: %q is no answer", answer)
		}
		if fields[0] != strings.TrimSpace(request) { // to a datagram that was given up
			continue
		}
		t.server = fields[1]
		if len(fields) > 2 && fields[2] == bye && t.kind != "udp" {
			t.end()
		}
		return nil
	}
}

// part with a socket after an error. A connected UDP socket stays while it meets
// silence alone: somebody else has to say that its endpoint is gone.
func (t *target) part(err error) {
	if t.kind == "udp" || t.kind == "udp-long" && errors.Is(err, errNoAnswer) {
		return
	}
	t.end()
}

func (t *target) end() {
	if t.socket != nil {
		t.socket.close()
	}
	t.socket, t.server = nil, ""
}

func (t *target) tell(begun time.Time, err error) {
	now := time.Now()
	f := Failure{At: begun, MS: now.Sub(begun).Milliseconds(), Target: t.name, Kind: t.kind, To: t.to.String(), Server: t.server}
	if err != nil {
		f.Error = err.Error()
		if t.socket != nil {
			f.Endpoint = t.socket.leadsTo()
		}
	}
	t.line.Lock()
	defer t.line.Unlock()
	t.line.asked++
	if err == nil {
		t.answered = now
		return
	}
	t.line.failed++
	_ = t.line.out.Encode(f) // nobody listens any more
}
