package fault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
)

// Healthy traffic: what nothing is wrong with, and what tools cry wolf about.

// healthy are servers and clients of a scene that have nothing to do with its faults.
type healthy struct {
	*Part
	stop context.CancelFunc
	all  sync.WaitGroup
}

// background starts healthy traffic, which goes on until end, and waits until each
// part of it has succeeded once. turned makes the server's side the client.
func (s *scene) background(ctx context.Context, six, turned bool) (*healthy, error) {
	p, err := s.newPart(&Fault{Name: "background"}, six, true)
	if err != nil {
		return nil, err
	}
	if turned {
		around := *s
		around.client, around.server = s.server, s.client
		p.scene, p.from, p.to = &around, p.to, p.from
	}
	ctx, stop := context.WithCancel(ctx)
	h := &healthy{Part: p, stop: stop}
	if err := h.listen(); err != nil {
		h.end()
		return nil, err
	}
	started := make(chan struct{}, 8)
	for _, f := range []func(context.Context, func()){h.web, h.names, h.longLived, h.slowReader, h.aborting} {
		h.all.Go(func() {
			once := sync.OnceFunc(func() { started <- struct{}{} })
			f(ctx, once)
		})
	}
	limit := time.After(20 * time.Second)
	for range 5 {
		select {
		case <-started:
		case <-limit:
			h.end()
			return nil, errors.New("healthy traffic did not begin: its clients saw " + h.outcomes())
		case <-ctx.Done():
			h.end()
			return nil, ctx.Err()
		}
	}
	return h, nil
}

func (h *healthy) end() {
	h.stop()
	h.Part.end()
	h.all.Wait()
}

// The ports of healthy servers, from the part's own on.
const (
	webPort = iota
	namesPort
	longPort
	slowPort
)

func (h *healthy) at(port uint16) netip.AddrPort { return netip.AddrPortFrom(h.to, h.port+port) }

func (h *healthy) listen() error {
	page := make([]byte, 20000)
	return errors.Join(
		h.serve(h.server, h.at(webPort), func(conn net.Conn) {
			conn.Read(make([]byte, 1000))
			conn.Write(page)
		}),
		h.answers(h.server, h.at(namesPort)),
		h.serve(h.server, h.at(longPort), echo),
		h.serve(h.server, h.at(slowPort), func(conn net.Conn) {
			conn.Read(make([]byte, 1000))
			for range 5 {
				conn.Write(make([]byte, 100_000))
			}
		}))
}

// connect is a connection to a healthy server that ends with ctx.
func (h *healthy) connect(ctx context.Context, network string, port uint16) (net.Conn, func(), error) {
	conn, err := dial(ctx, h.client, network, h.from, h.at(port), patience)
	if err != nil {
		h.saw(outcomeOf(err, Timeout))
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	return conn, func() { stop(); conn.Close() }, nil
}

// repeat calls f until ctx ends, and says once that it succeeded.
func (h *healthy) repeat(ctx context.Context, between time.Duration, began func(), f func() error) {
	for {
		err := f()
		h.saw(outcomeOf(err, Timeout))
		if err == nil {
			began()
		}
		if !rest(ctx, between) {
			return
		}
	}
}

// web asks for pages, each on a connection of its own.
func (h *healthy) web(ctx context.Context, began func()) {
	h.repeat(ctx, 70*time.Millisecond, began, func() error {
		conn, end, err := h.connect(ctx, "tcp", webPort)
		if err != nil {
			return err
		}
		defer end()
		conn.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
		n, err := io.Copy(io.Discard, conn)
		if err == nil && n < 20000 {
			err = io.ErrUnexpectedEOF
		}
		return err
	})
}

// names asks short questions by UDP.
func (h *healthy) names(ctx context.Context, began func()) {
	h.repeat(ctx, 50*time.Millisecond, began, func() error {
		conn, end, err := h.connect(ctx, "udp", namesPort)
		if err != nil {
			return err
		}
		defer end()
		conn.Write(make([]byte, 40))
		conn.SetReadDeadline(time.Now().Add(time.Second))
		_, err = conn.Read(make([]byte, 512))
		return err
	})
}

// longLived keeps one connection and says something now and then.
func (h *healthy) longLived(ctx context.Context, began func()) {
	var conn net.Conn
	end := func() {}
	defer func() { end() }()
	h.repeat(ctx, 100*time.Millisecond, began, func() (err error) {
		if conn == nil {
			if conn, end, err = h.connect(ctx, "tcp", longPort); err != nil {
				end = func() {}
				return err
			}
		}
		conn.Write(make([]byte, 200))
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err = io.ReadFull(conn, make([]byte, 200)); err != nil {
			end()
			conn, end = nil, func() {}
		}
		return err
	})
}

// slowReader takes its time over half a megabyte.
func (h *healthy) slowReader(ctx context.Context, began func()) {
	h.repeat(ctx, 100*time.Millisecond, began, func() error {
		conn, end, err := h.connect(ctx, "tcp", slowPort)
		if err != nil {
			return err
		}
		defer end()
		conn.(*net.TCPConn).SetReadBuffer(64 << 10)
		conn.Write([]byte("all of it"))
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		buffer := make([]byte, 32<<10)
		for {
			n, err := io.ReadFull(conn, buffer)
			if err == io.EOF || err == io.ErrUnexpectedEOF {
				return nil
			}
			if err != nil || n == 0 {
				return err
			}
			if !rest(ctx, 20*time.Millisecond) {
				return nil
			}
		}
	})
}

// aborting gives its connections up by a reset, some in the middle of an answer.
func (h *healthy) aborting(ctx context.Context, began func()) {
	half := false
	h.repeat(ctx, 150*time.Millisecond, began, func() error {
		conn, end, err := h.connect(ctx, "tcp", webPort)
		if err != nil {
			return err
		}
		defer end()
		conn.(*net.TCPConn).SetLinger(0)
		conn.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
		if half = !half; half {
			_, err = io.ReadFull(conn, make([]byte, 5000))
		}
		return err
	})
}

// waiting is the application of a healthy run whose traffic is the background.
func waiting(ctx context.Context, p *Part) {
	rest(ctx, 2*time.Second)
	p.saw(OK)
}

// guarded has rules, translation and connection tracking that hurt nobody.
func guarded(p *Part) error {
	text := `table inet guard {
		chain f { type filter hook forward priority 0; policy accept; ct state established,related accept; ct state invalid counter drop; tcp dport 9 counter drop; }
		chain i { type filter hook input priority 0; policy accept; tcp dport 9 reject; }
		chain n { type nat hook postrouting priority 100; masquerade; }
	}`
	return errors.Join(p.servers(), p.router.feed(text, "nft", "-f", "-"))
}

// mixed are calls and questions that all succeed.
func mixed(ctx context.Context, p *Part) {
	calls(ctx, p)
	questions(ctx, p)
	bigCalls(ctx, p)
}

// shaped lets the router's way to the server take little, with room for some packets: TCP
// finds its rate by filling it.
func shaped(p *Part) error {
	rate := uint64(250_000 << p.draw(3)) // bytes a second
	tbf := &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: p.router.index(p.router.far), Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate, Limit: uint32(20_000 << p.draw(2)), Buffer: uint32(5000 * 15625 / rate * 1000),
	}
	if err := p.router.net.QdiscAdd(tbf); err != nil {
		return fmt.Errorf("add tbf to %s in %s: %w", p.router.far, p.router.name, err)
	}
	return nil
}

// fillWay sends more than the way takes at once, and is done when it is there.
func fillWay(ctx context.Context, p *Part) {
	conn, err := p.connect(ctx, "tcp")
	if err != nil {
		p.saw(outcomeOf(err, Timeout))
		return
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	go io.Copy(io.Discard, conn)
	for ctx.Err() == nil {
		if _, err := conn.Write(make([]byte, 16<<10)); err != nil {
			if ctx.Err() == nil {
				p.saw(outcomeOf(err, Hang))
			}
			return
		}
		p.saw(OK)
	}
}

// crossing is a server that closes idle connections, at the moment at which the client asks
// again. The client tries again, as clients do (RFC 9112, 9.3.1).
func crossing(p *Part) error {
	p.asked = make(chan struct{})
	p.atEnd(func() { close(p.asked) })
	return p.serve(p.server, p.local(p.port), func(conn net.Conn) {
		buffer := make([]byte, 64)
		if n, err := conn.Read(buffer); err == nil {
			conn.Write(buffer[:n])
			<-p.asked // it has decided to close when the question comes
		}
	})
}

// askLate asks, is silent for a while, and asks again when the server closes.
func askLate(ctx context.Context, p *Part) {
	for range 2 {
		conn, err := p.connect(ctx, "tcp")
		if err != nil {
			p.saw(outcomeOf(err, Timeout))
			return
		}
		p.saw(p.exchange(ctx, conn, 10))
		idle := rest(ctx, 1300*time.Millisecond)
		conn.Write(make([]byte, 300))
		select {
		case p.asked <- struct{}{}:
			conn.SetReadDeadline(time.Now().Add(patience))
			conn.Read(make([]byte, 300)) // a reset
		case <-ctx.Done():
		}
		conn.Close()
		if !idle {
			return
		}
	}
}

var controls = []*Fault{
	{Name: "path-mtu-works", Number: "02c", Says: "The way is narrower than the links, and the client is told and sends smaller packets.",
		Seen: []Outcome{OK}, induce: serving(narrowWay), send: bigCalls},
	{Name: "healthy", Says: "Pages, names, a long connection, a slow reader, a client that gives up: nothing is wrong.",
		Seen: []Outcome{OK}, induce: serving(), send: waiting},
	{Name: "healthy-calls", Says: "Connections and datagrams, small and large, that all succeed.",
		Seen: []Outcome{OK}, induce: serving(), send: mixed},
	{Name: "healthy-guarded", Says: "Rules, translation and connection tracking that drop nothing of what is sent.",
		Seen: []Outcome{OK}, needs: []string{"nft"}, induce: guarded, send: mixed},
	{Name: "healthy-bridge", Says: "A switch with nothing wrong.", shape: shape{bridged: true},
		Seen: []Outcome{OK}, induce: serving(), send: mixed},
	{Name: "healthy-vxlan", Says: "A tunnel whose devices leave room for what it adds.",
		Seen: []Outcome{OK}, induce: digging(func(*Part, *tunnel) {}), send: mixed},
	{Name: "healthy-shaped", Says: "TCP fills a way that is limited, as it should.",
		Seen: []Outcome{OK}, alone: true, induce: serving(shaped), send: fillWay, took: overflowed},
	{Name: "healthy-crossing", Says: "A server closes idle connections, some at the moment of the next question.",
		Seen: []Outcome{OK}, induce: crossing, send: askLate, took: grew(atServer, "TcpExt", "TCPAbortOnClose")},
}
