package nodedns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// Query is what a process of the node asks the DNS Service.
type Query struct {
	// From is the socket's address and port.
	From netip.AddrPort
	// Message is the query as it came (RFC 1035, 4), with one question; nobody has read more
	// of it yet.
	Message []byte
}

const (
	// patience is how long a query is in hand at most. Clients ask again after 5 s
	// (resolv.conf(5), timeout).
	patience = 4500 * time.Millisecond
	// mostInHand bounds the queries in hand, and with them the sockets by which the DNS
	// Service is asked. From half of them on new ones are left to the DNS Service, until
	// there are less than a quarter.
	mostInHand = 1024
	// mostMessage is longer than any query; what is longer is no query.
	mostMessage = 4096
	// waitingBytes is what may wait to be read, by the kernel's reckoning: a thousand
	// queries.
	waitingBytes = 1 << 20
	// lastFor is how long after the end what was sent before is still answered, quietAfter
	// how long nothing may come until that is all.
	lastFor    = 3 * time.Second
	quietAfter = 20 * time.Millisecond
)

// loopback is where the agent's socket of a family is.
var loopback = map[datapathFamily]netip.Addr{
	datapathFamilyFAMILY_IP4: netip.AddrFrom4([4]byte{127, 0, 0, 1}),
	datapathFamilyFAMILY_IP6: netip.IPv6Loopback(),
}

// counts are what became of the queries that came to the agent.
type counts struct{ answered, relayed, unanswered, malformed, crowded atomic.Uint64 }

// all are the counts by their words (docs/dns.md).
func (c *counts) all() map[string]uint64 {
	return map[string]uint64{
		"agent_answered": c.answered.Load(), "agent_relayed": c.relayed.Load(), "agent_unanswered": c.unanswered.Load(),
		"agent_malformed": c.malformed.Load(), "agent_crowded": c.crowded.Load(),
	}
}

// Serve answers what the programs send to the agent until the context ends, and then what
// was sent before. answer is called for each query in a goroutine of its own, at most 1,024
// at once; it returns a message that replies to the query, or false. Then, and where it
// takes too long, the query is put to the DNS Service, and its answer given to who asked.
//
// The layer has to be open, and remains so until Serve has returned. While it runs, and
// beats come, queries are sent here. Errors name what could not be begun: then none is.
func (l *Layer) Serve(ctx context.Context, answer func(ctx context.Context, q Query) (reply []byte, ok bool)) error {
	s, err := l.begin()
	if err != nil {
		return fmt.Errorf("serve queries of the node: %w", err)
	}
	defer func() {
		s.close()
		l.mu.Lock()
		l.serving = false
		l.mu.Unlock()
	}()
	s.answer = answer
	return s.run(ctx)
}

// begin opens the agent's sockets and tells the programs where they are.
func (l *Layer) begin() (*server, error) {
	l.mu.Lock()
	if l.host == nil || l.serving {
		l.mu.Unlock()
		return nil, errors.New("the nodedns layer is not open, or serves already")
	}
	p, err := l.host.presence()
	l.serving, l.deaf = err == nil, map[datapathFamily]error{}
	l.mu.Unlock()
	if err != nil {
		return nil, err
	}
	s := &server{layer: l, presence: p, conns: map[datapathFamily]*net.UDPConn{}, held: map[datapathAsker]int{}}
	for family := range datapathFamilyFAMILY_COUNT {
		if err = s.listen(family); err == nil {
			continue
		}
		err = fmt.Errorf("listen on %s: %w", loopback[family], err)
		if family == datapathFamilyFAMILY_IP4 {
			s.close()
			l.mu.Lock()
			l.serving = false
			l.mu.Unlock()
			return nil, err
		}
		l.mu.Lock() // a node may be without IPv6
		l.deaf[family] = err
		l.mu.Unlock()
	}
	return s, nil
}

// server is the agent's side of what the programs send to it.
type server struct {
	layer    *Layer
	presence *presence
	conns    map[datapathFamily]*net.UDPConn
	answer   func(context.Context, Query) ([]byte, bool)
	handlers sync.WaitGroup
	inHand   atomic.Int64
	ending   atomic.Bool

	mu sync.Mutex // guards what follows
	// held are the queries in hand: a client may ask twice under one id.
	held map[datapathAsker]int
}

// listen opens the socket of a family, at the port of the process before it where that is
// free: who is connected to it need not connect again.
func (s *server) listen(family datapathFamily) error {
	l := s.layer
	l.mu.Lock()
	by, _, err := l.tables.detours.Get(family)
	l.mu.Unlock()
	if err != nil {
		return err
	}
	c, err := s.open(family, hostOrder(by.Port))
	if err != nil {
		c, err = s.open(family, 0)
	}
	if err != nil {
		return err
	}
	s.conns[family] = c
	at := c.LocalAddr().(*net.UDPAddr).AddrPort()
	err = l.change(family, func(by *datapathDetour) {
		by.Agent, by.Port = addressOf(at.Addr().Unmap()), hostOrder(at.Port())
	})
	if err != nil {
		return err
	}
	return s.presence.attend(family, c)
}

func (s *server) open(family datapathFamily, port uint16) (c *net.UDPConn, err error) {
	err = netns.In(s.layer.settings.Netns, func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback[family], port)))
		return err
	})
	if err != nil {
		return nil, err
	}
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { // what cannot wait is asked again
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, waitingBytes)
		})
	}
	return c, nil
}

// hostOrder turns a port from the network's order, or into it.
func hostOrder(port uint16) uint16 { return port<<8 | port>>8 }

func (s *server) close() {
	for _, c := range s.conns {
		c.Close()
	}
	s.presence.close()
}

// run serves until the context ends, and then what was sent before.
func (s *server) run(ctx context.Context) error {
	if err := s.presence.beat(); err != nil {
		return err
	}
	done := make(chan struct{})
	var beating, reading sync.WaitGroup
	beating.Go(func() { s.beats(done) })
	base, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	s.sweep(base, 0)
	for family, c := range s.conns {
		reading.Go(func() { s.read(base, family, c) })
	}
	beating.Go(func() { s.sweeps(base, done) })
	<-ctx.Done()
	err := s.presence.end()
	s.ending.Store(true)
	for _, c := range s.conns {
		_ = c.SetReadDeadline(time.Now().Add(quietAfter))
	}
	late := time.AfterFunc(lastFor, cut)
	defer late.Stop()
	reading.Wait()
	s.handlers.Wait()
	close(done)
	beating.Wait()
	return err
}

// beats says that the agent is there until done is closed. Silence makes the programs leave
// everything to the DNS Service.
func (s *server) beats(done <-chan struct{}) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			s.comeBack()
			_ = s.presence.beat()
		}
	}
}

// comeBack takes queries again when few enough are in hand.
func (s *server) comeBack() {
	if s.inHand.Load() < mostInHand/4 && !s.ending.Load() {
		_ = s.presence.stepAside(false)
	}
}

// read begins what comes to a socket, until it is closed; after the end until nothing more
// comes.
func (s *server) read(ctx context.Context, family datapathFamily, c *net.UDPConn) {
	buffer := make([]byte, mostMessage)
	for ctx.Err() == nil {
		n, from, err := c.ReadFromUDPAddrPort(buffer)
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if s.ending.Load() {
			_ = c.SetReadDeadline(time.Now().Add(quietAfter))
		}
		if err == nil && n < mostMessage {
			s.take(ctx, family, c, Query{From: netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), Message: bytes.Clone(buffer[:n])})
		}
	}
}

// take has a query answered, if not too many are in hand.
func (s *server) take(ctx context.Context, family datapathFamily, c *net.UDPConn, q Query) {
	switch n := s.inHand.Add(1); {
	case n > mostInHand:
		s.inHand.Add(-1)
		s.layer.counts.crowded.Add(1) // sweep finds it
		return
	case n == mostInHand/2:
		_ = s.presence.stepAside(true)
	}
	key := s.keyOf(c, q)
	s.hold(key, 1)
	s.handlers.Go(func() {
		defer func() {
			if s.inHand.Add(-1) == mostInHand/4-1 {
				s.comeBack()
			}
		}()
		ctx, done := context.WithTimeout(ctx, patience)
		defer done()
		reply := s.replyTo(ctx, family, q)
		s.hold(key, -1)
		if reply != nil {
			_, _ = c.WriteToUDPAddrPort(reply, q.From)
		}
		_ = s.presence.waiting.Delete(key)
	})
}

// replyTo is the answer to a query: the agent's, else the DNS Service's; nil if there is
// none in time.
func (s *server) replyTo(ctx context.Context, family datapathFamily, q Query) []byte {
	count := &s.layer.counts
	if !isQuery(q.Message) {
		count.malformed.Add(1)
		return nil
	}
	question := questionOf(q.Message)
	if question == nil {
		count.malformed.Add(1)
		return formatError(q.Message)
	}
	if reply, ok := s.answer(ctx, q); ok {
		count.answered.Add(1)
		return reply
	}
	reply := s.relay(ctx, family, q.Message, question)
	if reply == nil {
		count.unanswered.Add(1)
		return nil
	}
	count.relayed.Add(1)
	return reply
}
