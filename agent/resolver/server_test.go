package resolver

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/millrace/millrace/model"
)

// Others may send what they like to the port from which a server is asked: only the answer
// to the question, from the server, counts.
func TestGuessesAreNotBelieved(t *testing.T) {
	const evil = " 600 IN A 203.0.113.66"
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	listener, err := net.Listen("tcp", packets.LocalAddr().String())
	if err != nil {
		t.Skipf("the port is taken over TCP: %v", err)
	}
	stream := &dns.Server{Listener: listener, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		zone(m, true)
		w.WriteMsg(m)
	})}
	go stream.ActivateAndServe()
	defer stream.Shutdown()
	stranger, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	neighbour, err := net.ListenPacket("udp", fmt.Sprintf("127.0.0.2:%d", packets.LocalAddr().(*net.UDPAddr).Port))
	if err != nil {
		t.Skipf("the port is taken at another address: %v", err)
	}
	defer neighbour.Close()
	var mu sync.Mutex
	ports := map[string]bool{}
	guesses := map[string]func(q, m *dns.Msg){
		"id":       func(_, m *dns.Msg) { m.Id++ },
		"question": func(_, m *dns.Msg) { m.Question[0].Name = "guess.example.com." },
		"type":     func(_, m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA },
		"class":    func(_, m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS },
		"two":      func(_, m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) },
		"query":    func(_, m *dns.Msg) { m.Response = false },
		"none":     func(_, m *dns.Msg) { m.Question = nil },
	}
	var way atomic.Value
	way.Store("")
	go func() {
		buffer := make([]byte, 4096)
		for {
			n, from, err := packets.ReadFrom(buffer)
			if err != nil {
				return
			}
			mu.Lock()
			ports[from.String()] = true
			mu.Unlock()
			q := new(dns.Msg)
			q.Unpack(buffer[:n])
			forged := new(dns.Msg).SetReply(q)
			forged.Answer = append(forged.Answer, rr(q.Question[0].Name+evil))
			right, _ := forged.Pack()
			stranger.WriteTo(right, from)  // right in all but the port it is from, ...
			neighbour.WriteTo(right, from) // ... or the address
			guess := way.Load().(string)
			rounds := 1
			if guess == "storm" {
				rounds, guess = missesMost, "id"
			}
			guesses[guess](q, forged)
			wrong, _ := forged.Pack()
			for range rounds {
				packets.WriteTo(wrong, from)
			}
			m := new(dns.Msg).SetReply(q)
			zone(m, false)
			m.Question[0].Name = strings.ToUpper(m.Question[0].Name) // there are servers that do not keep it
			packed, _ := m.Pack()
			packets.WriteTo(packed, from)
		}
	}()
	at := netip.MustParseAddrPort(packets.LocalAddr().String())
	for _, guess := range []string{"id", "question", "type", "class", "two", "query", "none", "storm"} {
		way.Store(guess)
		r := newResolver(t, &model.DNS{TTL: 5 * time.Second, Forwards: []model.Forward{{Zone: ".", To: []model.Upstream{{Address: at}}}}})
		if got := said(asks(t, r, question("www.example.com.", dns.TypeA))); got != "NOERROR; www.example.com. 300 IN A 192.0.2.1" {
			t.Errorf("%s: %s", guess, got)
		}
		if got := said(asks(t, r, question("other.example.com.", dns.TypeA))); !strings.HasPrefix(got, "NXDOMAIN") {
			t.Errorf("%s: of another name it is believed: %s", guess, got)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(ports) < 8 {
		t.Errorf("questions came from these ports only: %v", ports)
	}
}

// Of a right answer only what the question leads to counts.
func TestWhatWasNotAskedForIsNotKept(t *testing.T) {
	u := newUpstream(t, func(m *dns.Msg, tcp bool) {
		if m.Question[0].Name == "www.example.com." && m.Question[0].Qtype == dns.TypeA {
			for _, text := range []string{"bank.example.net. 600 IN A 203.0.113.66", "x.example.com. 600 IN CNAME bank.example.net."} {
				m.Answer = append(m.Answer, rr(text))
			}
			m.Ns = append(m.Ns, rr("example.net. 600 IN NS ns.example.com."), rr("net. 600 IN SOA a. b. 1 1 1 1 600"))
			m.Extra = append(m.Extra, rr("bank.example.net. 600 IN A 203.0.113.66"))
		}
		zone(m, tcp)
	})
	r := newResolver(t, forwardsTo(u))
	if got := said(asks(t, r, question("www.example.com.", dns.TypeA))); got != "NOERROR; www.example.com. 300 IN A 192.0.2.1" {
		t.Error(got)
	}
	for _, name := range []string{"bank.example.net.", "x.example.com."} {
		if got := said(asks(t, r, question(name, dns.TypeA))); !strings.HasPrefix(got, "NXDOMAIN") {
			t.Errorf("%s: %s", name, got)
		}
	}
	for name, m := range map[string]*dns.Msg{
		"a circle":       {Answer: []dns.RR{rr("a. 1 IN CNAME b."), rr("b. 1 IN CNAME a.")}},
		"itself":         {Answer: []dns.RR{rr("a. 1 IN CNAME a.")}},
		"too long":       {Answer: chain(chainMost + 1)},
		"SERVFAIL":       {MsgHdr: dns.MsgHdr{Rcode: dns.RcodeServerFailure}},
		"REFUSED":        {MsgHdr: dns.MsgHdr{Rcode: dns.RcodeRefused}},
		"absent and not": {MsgHdr: dns.MsgHdr{Rcode: dns.RcodeNameError}, Answer: []dns.RR{rr("a. 1 IN A 192.0.2.1")}},
	} {
		if a, err := accept("a.", dns.TypeA, m); err == nil {
			t.Errorf("%s: accepted as %+v", name, a)
		}
	}
	// A negative answer is kept by the record of a zone that the name is in, or not at all.
	for owner, kept := range map[string]bool{"example.com.": true, ".": true, "www.example.com.": true, "example.net.": false, "a.www.example.com.": false} {
		a, err := accept("www.example.com.", dns.TypeA, &dns.Msg{Ns: []dns.RR{rr(owner + " 60 IN SOA a. b. 1 1 1 1 60")}})
		if err != nil || (a.ttl > 0) != kept {
			t.Errorf("SOA of %s: %+v, %v", owner, a, err)
		}
	}
}

func chain(n int) (all []dns.RR) {
	for i := range n {
		all = append(all, rr(strings.Repeat("a", i+1)+". 1 IN CNAME "+strings.Repeat("a", i+2)+"."))
	}
	return all
}

// A server that is silent costs nobody a lookup of what is known: the first who asks waits
// for less than two seconds, all others not at all; it is asked again when it answers.
func TestBlackHole(t *testing.T) {
	u := newUpstream(t, zone)
	r := newResolver(t, forwardsTo(u))
	names := []string{"www.example.com.", "alias.example.com.", "only4.example.com."}
	for _, name := range names {
		asks(t, r, question(name, dns.TypeA))
	}
	u.deaf.Store(true)
	r.now = func() time.Time { return time.Now().Add(time.Hour) } // far beyond each TTL
	ask := func(name string) (string, Source, time.Duration) {
		begun := time.Now()
		q := query{written: name, name: name, kind: dns.TypeA, recursive: true, size: mostUDP}
		m, source := r.answer(t.Context(), "pod", &q, r.now())
		return said(m), source, time.Since(begun)
	}
	for round := range 3 {
		for _, name := range names {
			got, source, took := ask(name)
			if source != Stale || !strings.Contains(got, " 30 IN A 192.0.2.1") {
				t.Errorf("round %d: %s: %v: %s", round, name, source, got)
			}
			if took > staleAfter+time.Second || round > 0 && took > time.Second {
				t.Errorf("round %d: %s took %v", round, name, took)
			}
		}
	}
	got, source, took := ask("new.example.com.")
	if source != HandedBack || took > backAfter+time.Second {
		t.Errorf("a name that nobody knows: %v after %v: %s", source, took, got)
	}
	until(t, "the server is down", func() bool { return len(r.Status().Down) == 1 })
	if _, source, took := ask("another.example.com."); source != HandedBack || took > time.Second {
		t.Errorf("the server is known to be down: %v after %v", source, took)
	}
	before := u.asked.Load()
	time.Sleep(time.Second)
	if n := u.asked.Load() - before; n > 3 {
		t.Errorf("a server that is down was asked %d times in a second", n)
	}
	u.deaf.Store(false)
	until(t, "the server is up", func() bool { return len(r.Status().Down) == 0 })
	if got, source, took := ask("later.example.com."); source != Upstream || !strings.HasPrefix(got, "NXDOMAIN") {
		t.Errorf("once the server is back: %v after %v: %s", source, took, got)
	}
}

// Of two servers one is silent, or refuses: no lookup fails, and after a few nobody waits.
func TestNextServer(t *testing.T) {
	for _, what := range []string{"silent", "broken", "gone"} {
		says := zone
		if what == "broken" {
			says = func(m *dns.Msg, _ bool) { m.Rcode = dns.RcodeServerFailure }
		}
		bad := newUpstream(t, says)
		bad.deaf.Store(what == "silent")
		good := newUpstream(t, zone)
		d := forwardsTo(bad, good)
		if what == "gone" {
			d.Forwards[0].To[0].Address = netip.MustParseAddrPort("127.0.0.1:1")
		}
		r := newResolver(t, d)
		var slow int
		for i := range 40 {
			begun := time.Now()
			name := strings.Repeat("x", i+1) + ".example.com."
			if got := said(asks(t, r, question(name, dns.TypeA))); !strings.HasPrefix(got, "NXDOMAIN") {
				t.Errorf("%s: %s: %s", what, name, got)
			}
			if time.Since(begun) >= patienceFirst {
				slow++
			}
		}
		if slow > 12 {
			t.Errorf("%s: %d of 40 lookups had to wait", what, slow)
		}
		t.Logf("%s: %d of 40 lookups had to wait", what, slow)
	}
}

// A server that knows no EDNS is asked without.
func TestServerWithoutEDNS(t *testing.T) {
	u := &upstream{}
	server := &dns.Server{Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if zone(m, false); q.IsEdns0() != nil {
			m.Answer, m.Rcode = nil, dns.RcodeFormatError
		}
		w.WriteMsg(m)
	})}
	var err error
	if server.PacketConn, err = net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	go server.ActivateAndServe()
	defer server.Shutdown()
	u.at = netip.MustParseAddrPort(server.PacketConn.LocalAddr().String())
	if got := said(asks(t, newResolver(t, forwardsTo(u)), question("www.example.com.", dns.TypeA))); !strings.Contains(got, "192.0.2.1") {
		t.Error(got)
	}
}

// certificate makes one for a name, and who vouches for it.
func certificate(t *testing.T, name string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}, roots
}

// counted counts connections.
type counted struct {
	net.Listener
	n atomic.Int64
}

func (c *counted) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.n.Add(1)
	}
	return conn, err
}

// DNS over TLS: connections are kept, also where the server closes them, and one whose
// certificate is another's, or of nobody known, is told nothing.
func TestOverTLS(t *testing.T) {
	const name = "dns.example.net"
	cert, roots := certificate(t, name)
	_, strangers := certificate(t, name)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	connections := &counted{Listener: listener}
	var asked atomic.Int64
	server := &dns.Server{IdleTimeout: func() time.Duration { return time.Second },
		Listener: tls.NewListener(connections, &tls.Config{Certificates: []tls.Certificate{cert}}),
		Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			asked.Add(1)
			m := new(dns.Msg).SetReply(q)
			zone(m, true)
			w.WriteMsg(m)
		})}
	go server.ActivateAndServe()
	defer server.Shutdown()
	at := netip.MustParseAddrPort(listener.Addr().String())
	over := func(name string, roots *x509.CertPool) *Resolver {
		r := New(Settings{Zone: "cluster.local", Roots: roots})
		t.Cleanup(r.Close)
		r.Configure(&model.DNS{TTL: 5 * time.Second, Forwards: []model.Forward{{Zone: ".", To: []model.Upstream{{Address: at, ServerName: name}}}}})
		return r
	}
	r := over(name, roots)
	for _, host := range []string{"www", "alias", "only4", "no", "mail"} {
		if got := asks(t, r, question(host+".example.com.", dns.TypeA)); got == nil {
			t.Errorf("%s: handed back", host)
		}
	}
	if n := connections.n.Load(); n != 1 {
		t.Errorf("%d connections for five questions", n)
	}
	time.Sleep(1500 * time.Millisecond) // the server closes what is idle
	if got := asks(t, r, question("late.example.com.", dns.TypeA)); got == nil || connections.n.Load() != 2 {
		t.Errorf("after the server closed its connection: %s, %d connections", said(got), connections.n.Load())
	}
	before := asked.Load()
	for what, r := range map[string]*Resolver{"another name": over("other.example.net", roots), "a stranger": over(name, strangers), "nobody vouches": over(name, x509.NewCertPool())} {
		if got := asks(t, r, question("www.example.com.", dns.TypeA)); got != nil {
			t.Errorf("%s: %s", what, said(got))
		}
	}
	if n := asked.Load() - before; n > 0 {
		t.Errorf("servers with wrong certificates were asked %d times", n)
	}
}

// The servers of a file are those that it names now.
func TestServersOfAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	d := &model.DNS{TTL: 5 * time.Second, Forwards: []model.Forward{{Zone: ".", To: []model.Upstream{{File: file}}}}}
	r := newResolver(t, d)
	servers := func() []string {
		r.mu.Lock()
		r.arrange()
		r.mu.Unlock()
		all := r.Status().Servers
		slices.Sort(all)
		return all
	}
	two, one := []string{"192.0.2.1:53", "[2001:db8::1]:53"}, []string{"192.0.2.2:53"}
	for _, row := range []struct {
		text string
		want []string
	}{
		{"search example.com\n", nil}, // nothing was known before
		{"nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch example.com\n", two},
		{"", two}, // as while it is written
		{"nameserver nonsense\n", two},
		{"nameserver 192.0.2.2\n", one},
		{"search example.com\n", one},
	} {
		if err := os.WriteFile(file, []byte(row.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := servers(); !slices.Equal(got, row.want) {
			t.Errorf("%q: %v, not %v", row.text, got, row.want)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if got := servers(); !slices.Equal(got, one) {
		t.Errorf("no file: %v, not %v", got, one)
	}
}
