package nodedns

import (
	"context"
	"net"
	"net/netip"
	"time"
)

// What comes to the agent's sockets waits in a map of the kernel's as well, until the agent
// deletes it: so what an agent has in hand when it is killed its successor finds and answers.

// sweepEvery is how often what waits is looked through for what was never read: the socket's
// queue was full, or too many were in hand. sweptAfter is how long that waited by then.
const (
	sweepEvery = time.Second
	sweptAfter = 500 * time.Millisecond
)

// keyOf is under which key a query waits; without one for a message without an id.
func (s *server) keyOf(c *net.UDPConn, q Query) (key datapathAsker) {
	if len(q.Message) >= header {
		at := c.LocalAddr().(*net.UDPAddr).AddrPort()
		key.Address, key.Port, key.To = addressOf(q.From.Addr()), hostOrder(q.From.Port()), hostOrder(at.Port())
		key.Id = uint16(q.Message[0]) | uint16(q.Message[1])<<8
	}
	return key
}

// hold notes that a query is in hand, or is not any more.
func (s *server) hold(key datapathAsker, more int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[key] += more; s.held[key] == 0 {
		delete(s.held, key)
	}
}

// sweeps looks through what waits until done is closed.
func (s *server) sweeps(ctx context.Context, done <-chan struct{}) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			s.sweep(ctx, sweptAfter)
		}
	}
}

// sweep takes what has waited for so long and is not in hand, and forgets what waits longer
// than a client does.
func (s *server) sweep(ctx context.Context, since time.Duration) {
	now, err := sinceBoot()
	if err != nil {
		return
	}
	var last any
	for range s.presence.waiting.MaxEntries() { // entries come and go meanwhile
		var key datapathAsker
		if s.presence.waiting.NextKey(last, &key) != nil {
			return
		}
		last = key
		var query datapathQuery
		if s.presence.waiting.Lookup(key, &query) != nil {
			continue
		}
		age := time.Duration(now - query.Since)
		c := s.conns[familyOf(fromAddress(key.Address))]
		switch {
		case age > patience || c == nil || hostOrder(key.To) != c.LocalAddr().(*net.UDPAddr).AddrPort().Port():
			_ = s.presence.waiting.Delete(key) // the client has asked again, or waits elsewhere
		case age >= since && !s.holds(key) && !s.ending.Load():
			from := netip.AddrPortFrom(fromAddress(key.Address), hostOrder(key.Port))
			s.take(ctx, familyOf(from.Addr()), c, Query{From: from, Message: query.Message[:min(int(query.Length), len(query.Message))]})
		}
	}
}

func (s *server) holds(key datapathAsker) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held[key] > 0
}
