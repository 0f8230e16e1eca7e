package resolver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"

	"github.com/millrace/millrace/model"
)

const (
	// patienceFirst, patienceLeast and patienceMost bound how long a server has before the
	// next one is asked as well; in between it is four times what it takes of late. Unbound
	// begins with 376 ms.
	patienceFirst = 400 * time.Millisecond
	patienceLeast = 100 * time.Millisecond
	patienceMost  = time.Second
	// attempts is how often servers are asked one question in all.
	attempts = 4
	// silentAfter is after how long without an answer, to this question or another, a server
	// has failed, if no other one has answered meanwhile; a name that is long to find is
	// nobody's failure.
	silentAfter = time.Second
	// downAfter is after how many failures one after the other a server is not asked any
	// more but by probes (CoreDNS' forward has max_fails 2); they come after probeFirst, and
	// then ever more seldom, up to probeMost.
	downAfter  = 3
	probeFirst = 500 * time.Millisecond
	probeMost  = 5 * time.Second
	probeWait  = time.Second
	// missesMost is how many answers with another id or question may arrive before it is
	// asked again over TCP: somebody may be guessing (RFC 5452, 9.2).
	missesMost = 3
	// idleMost and idleFor bound the connections that are kept for the next question
	// (RFC 7766, 6.2.3: a few seconds).
	idleMost = 16
	idleFor  = 10 * time.Second
	// askMost is the longest that one server is waited for.
	askMost = 5 * time.Second
)

var errGuessed = errors.New("it sent answers to other questions, which may be somebody's guesses")

// server is one that is asked.
type server struct {
	to    model.Upstream
	roots *x509.CertPool
	// control is called for each socket over UDP; nil for nothing.
	control func(network, address string, c syscall.RawConn) error

	mu     sync.Mutex
	took   time.Duration // smoothed; 0 at first
	heard  time.Time     // when it answered last
	failed int           // one after the other
	down   bool
	closed bool
	idle   []kept
	stop   chan struct{}
}

// kept is a connection that nobody uses, and since when.
type kept struct {
	conn  *dns.Conn
	since time.Time
}

func (r *Resolver) newServer(to model.Upstream) *server {
	return &server{to: to, roots: r.settings.Roots, control: r.settings.Control, stop: make(chan struct{})}
}

// String is where the server is, for messages.
func (s *server) String() string {
	if s.to.ServerName != "" {
		return "tls://" + s.to.Address.String()
	}
	return s.to.Address.String()
}

// patience is how long to wait before somebody else is asked.
func (s *server) patience() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.took == 0 {
		return patienceFirst
	}
	return min(max(4*s.took, patienceLeast), patienceMost)
}

func (s *server) isDown() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.down
}

// answered notes that the server is there, and how long it took.
func (s *server) answered(took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed, s.down, s.heard = 0, false, time.Now()
	if s.took == 0 {
		s.took = took
	}
	s.took += (took - s.took) / 8 // as TCP does, RFC 6298
}

// silent notes that the server has not answered what it was asked then. One that is down
// is looked after until it answers.
func (s *server) silent(since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.heard.After(since) {
		return
	}
	if s.failed++; s.failed >= downAfter && !s.down && !s.closed {
		s.down = true
		go s.probe()
	}
}

// probe asks for the root's servers until there is an answer, whatever it says, as
// CoreDNS' forward does.
func (s *server) probe() {
	wait := probeFirst
	for s.isDown() {
		select {
		case <-s.stop:
			return
		case <-time.After(wait/2 + rand.N(wait)):
		}
		wait = min(2*wait, probeMost)
		ctx, done := context.WithTimeout(context.Background(), probeWait)
		begun := time.Now()
		if _, err := s.exchange(ctx, ".", dns.TypeNS); err == nil {
			s.answered(time.Since(begun))
		}
		done()
	}
}

// close ends probes and the connections that are kept.
func (s *server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed, s.down = true, false
	close(s.stop)
	for _, k := range s.idle {
		k.conn.Close()
	}
	s.idle = nil
}

// ask asks, and says how the server is.
func (s *server) ask(ctx context.Context, name string, kind uint16) (*answer, error) {
	begun := time.Now()
	late := time.AfterFunc(silentAfter, func() { s.silent(begun) })
	m, err := s.exchange(ctx, name, kind)
	late.Stop()
	if err == nil {
		s.answered(time.Since(begun))
		var a *answer
		if a, err = accept(name, kind, m); err == nil {
			return a, nil
		}
	} else if ctx.Err() == nil {
		s.silent(begun) // refused, unreachable, a bad certificate
	}
	return nil, fmt.Errorf("ask %s for %s %s: %w", s, dns.Type(kind), name, err)
}

// exchange gets a message that answers the question and comes from the server.
func (s *server) exchange(ctx context.Context, name string, kind uint16) (*dns.Msg, error) {
	ctx, done := context.WithTimeout(ctx, askMost)
	defer done()
	m := &dns.Msg{}
	m.SetQuestion(name, kind)
	m.SetEdns0(mostUDP, false)
	reply, err := s.carry(ctx, m)
	if err == nil && (reply.Rcode == dns.RcodeFormatError || reply.Rcode == dns.RcodeNotImplemented) && reply.IsEdns0() == nil {
		m.Extra = nil // one that knows no EDNS (RFC 6891, 7)
		return s.carry(ctx, m)
	}
	return reply, err
}

// carry takes a question there by the way that the server wants.
func (s *server) carry(ctx context.Context, m *dns.Msg) (*dns.Msg, error) {
	if s.to.TCP || s.to.ServerName != "" {
		return s.stream(ctx, m)
	}
	reply, err := s.datagram(ctx, m)
	if errors.Is(err, errGuessed) || err == nil && reply.Truncated {
		return s.stream(ctx, m)
	}
	return reply, err
}

// datagram asks over UDP, from a port of its own and with an id of its own, both by
// chance; the kernel lets nobody answer but whom the socket is connected to.
func (s *server) datagram(ctx context.Context, m *dns.Msg) (*dns.Msg, error) {
	m.Id = dns.Id()
	packed, err := m.Pack()
	if err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{Control: s.control}).DialContext(ctx, "udp", s.to.Address.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write(packed); err != nil {
		return nil, err
	}
	buffer := make([]byte, 4096) // more than we allow
	for misses := 0; misses < missesMost; misses++ {
		n, err := conn.Read(buffer)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			return nil, err
		}
		var reply dns.Msg
		if err := reply.Unpack(buffer[:n]); answers(&reply, m) {
			if err != nil && !reply.Truncated {
				return nil, fmt.Errorf("read its answer: %w", err)
			}
			return &reply, nil
		}
	}
	return nil, errGuessed
}

// answers says whether a message is the answer to a question.
func answers(reply, m *dns.Msg) bool {
	return reply.Id == m.Id && reply.Response && reply.Opcode == m.Opcode && len(reply.Question) == 1 &&
		strings.EqualFold(reply.Question[0].Name, m.Question[0].Name) &&
		reply.Question[0].Qtype == m.Question[0].Qtype && reply.Question[0].Qclass == m.Question[0].Qclass
}

// stream asks over TCP or TLS. A connection that was kept may have been closed by the
// server meanwhile; then another one is made.
func (s *server) stream(ctx context.Context, m *dns.Msg) (*dns.Msg, error) {
	for {
		conn := s.take()
		old := conn != nil
		if !old {
			var err error
			if conn, err = s.dial(ctx); err != nil {
				return nil, err
			}
		}
		reply, err := over(ctx, conn, m)
		if err == nil {
			s.keep(conn)
			return reply, nil
		}
		conn.Close()
		if !old || ctx.Err() != nil {
			return nil, err
		}
	}
}

func over(ctx context.Context, conn *dns.Conn, m *dns.Msg) (*dns.Msg, error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	m.Id = dns.Id()
	if err := conn.WriteMsg(m); err != nil {
		return nil, err
	}
	reply, err := conn.ReadMsg()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	if !answers(reply, m) {
		return nil, errGuessed
	}
	return reply, nil
}

func (s *server) dial(ctx context.Context) (*dns.Conn, error) {
	var dialer net.Dialer
	if s.to.ServerName == "" {
		conn, err := dialer.DialContext(ctx, "tcp", s.to.Address.String())
		return &dns.Conn{Conn: conn}, err
	}
	secure := tls.Dialer{NetDialer: &dialer, Config: &tls.Config{ServerName: s.to.ServerName, RootCAs: s.roots, MinVersion: tls.VersionTLS12}}
	conn, err := secure.DialContext(ctx, "tcp", s.to.Address.String())
	return &dns.Conn{Conn: conn}, err
}

// take returns a connection that was kept, the newest; nil where there is none.
func (s *server) take() *dns.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.idle) > 0 {
		last := s.idle[len(s.idle)-1]
		s.idle = s.idle[:len(s.idle)-1]
		if time.Since(last.since) < idleFor {
			return last.conn
		}
		last.conn.Close()
	}
	return nil
}

func (s *server) keep(conn *dns.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.idle) > 0 && (time.Since(s.idle[0].since) >= idleFor || len(s.idle) >= idleMost) {
		s.idle[0].conn.Close()
		s.idle = s.idle[1:]
	}
	if s.closed {
		conn.Close()
		return
	}
	s.idle = append(s.idle, kept{conn, time.Now()})
}

// servers are those of one zone.
type servers []*server

// errDown says that none of them answers.
var errDown = errors.New("none of the servers answers")

// order is in which they are asked: by chance, as CoreDNS' forward does, those that do not
// answer left out.
func (all servers) order() servers {
	var up servers
	for _, s := range all {
		if !s.isDown() {
			up = append(up, s)
		}
	}
	rand.Shuffle(len(up), func(i, j int) { up[i], up[j] = up[j], up[i] })
	return up
}

// ask asks one after the other, the next as soon as one has failed or taken long, and
// takes the first answer of any.
func (all servers) ask(ctx context.Context, name string, kind uint16) (*answer, error) {
	order := all.order()
	if len(order) == 0 {
		return nil, errDown
	}
	ctx, done := context.WithTimeout(ctx, askMost)
	defer done()
	type outcome struct {
		by     int
		answer *answer
		err    error
	}
	outcomes := make(chan outcome, attempts)
	asked, out := 0, map[int]time.Time{} // when who was asked that has not answered
	var last error
	var patience <-chan time.Time
	next := func() {
		patience = nil
		if asked == attempts {
			return
		}
		by := asked
		s := order[by%len(order)]
		asked, out[by] = asked+1, time.Now()
		go func() {
			a, err := s.ask(ctx, name, kind)
			outcomes <- outcome{by, a, err}
		}()
		patience = time.After(s.patience())
	}
	for next(); len(out) > 0; {
		select {
		case o := <-outcomes:
			delete(out, o.by)
			if o.err == nil {
				for by, since := range out { // others would have known it by now
					if s := order[by%len(order)]; time.Since(since) >= s.patience() {
						s.silent(since)
					}
				}
				return o.answer, nil
			}
			if last = o.err; asked < len(order) {
				next()
			}
		case <-patience:
			next()
		case <-ctx.Done():
			return nil, fmt.Errorf("ask for %s %s: %w", dns.Type(kind), name, ctx.Err())
		}
	}
	return nil, last
}

// listed are the servers that a file like /etc/resolv.conf names.
func listed(file string) ([]netip.AddrPort, error) {
	config, err := dns.ClientConfigFromFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the DNS servers of %s: %w", file, err)
	}
	var all []netip.AddrPort
	for _, text := range config.Servers {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("read the DNS servers of %s: %w", file, err)
		}
		all = append(all, netip.AddrPortFrom(addr.Unmap(), 53))
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s names no DNS server: add a line `nameserver ADDRESS`", file)
	}
	return all, nil
}
