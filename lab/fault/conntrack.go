package fault

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// mostEntries is how many entries are made at most.
const mostEntries = 2 << 20

// tracked is a rule that needs connection tracking, in words that let everything pass.
func (p *Part) tracked(at *space, hook string) error {
	front := p.draw(3)
	if front == 2 {
		text := fmt.Sprintf("table inet state { chain c { type filter hook %s priority 0; ct state established accept; }; }", hook)
		return at.feed(text, "nft", "-f", "-")
	}
	words := p.tables([]string{"iptables-nft", "iptables-legacy"}[front])
	return at.run(words, "-w", "-A", strings.ToUpper(hook), "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
}

// fill fills the table of a namespace with established connections that nobody has.
func fill(p *Part) error {
	at, hook := p.router, "forward"
	if p.draw(3) == 1 {
		at, hook = p.server, "input"
	}
	p.blame(at)
	if err := p.tracked(at, hook); err != nil {
		return err
	}
	most, err := numberIn(at, "/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		return err
	}
	if most > mostEntries {
		return fmt.Errorf("nf_conntrack_max is %d: this fills at most %d", most, mostEntries)
	}
	var fd int
	err = at.do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		return err
	})
	if err != nil {
		return fmt.Errorf("make a socket of ctnetlink: %w", err)
	}
	defer unix.Close(fd)
	to := netip.AddrFrom4([4]byte{198, 18, byte(p.random.IntN(256)), 1})
	const batch = 250
	for made := 0; ; {
		count, err := numberIn(at, "/proc/sys/net/netfilter/nf_conntrack_count")
		if err != nil || count >= most {
			return err
		}
		for range min(100, (most-count)/batch+1) {
			var message []byte
			for range batch {
				from := netip.AddrFrom4([4]byte{198, 19, byte(made >> 15), byte(made >> 23)})
				message = append(message, entry(netip.AddrPortFrom(from, uint16(1024+made&0x7fff)), netip.AddrPortFrom(to, 443))...)
				made++
			}
			if err := unix.Sendto(fd, message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
				return fmt.Errorf("make entries of connection tracking: %w", err)
			}
		}
		if made > mostEntries+2*most {
			return fmt.Errorf("the table has %d of %d entries after %d were made", count, most, made)
		}
	}
}

func numberIn(at *space, file string) (n int, err error) {
	err = at.do(func() error {
		text, err := os.ReadFile(file)
		if err == nil {
			n, err = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		return err
	})
	return n, err
}

// Attributes and bits of ctnetlink (linux/netfilter/nfnetlink_conntrack.h).
const (
	ctaTupleOrig, ctaTupleReply, ctaStatus, ctaProtoInfo, ctaTimeout = 1, 2, 3, 4, 7
	ctaNew                                                           = 1 << 8
	seenReply, assured, confirmed                                    = 2, 4, 8
	nested                                                           = 1 << 15
)

func attribute(kind uint16, value ...byte) []byte {
	b := native.AppendUint16(nil, uint16(4+len(value)))
	b = native.AppendUint16(b, kind)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func tuple(kind uint16, from, to netip.AddrPort) []byte {
	f, t := from.Addr().As4(), to.Addr().As4()
	addresses := append(attribute(1, f[:]...), attribute(2, t[:]...)...)
	ports := append(attribute(1, unix.IPPROTO_TCP), attribute(2, binary.BigEndian.AppendUint16(nil, from.Port())...)...)
	ports = append(ports, attribute(3, binary.BigEndian.AppendUint16(nil, to.Port())...)...)
	return attribute(kind|nested, append(attribute(1|nested, addresses...), attribute(2|nested, ports...)...)...)
}

// entry is the message that makes an established connection.
func entry(from, to netip.AddrPort) []byte {
	body := []byte{unix.AF_INET, 0, 0, 0}
	body = append(body, tuple(ctaTupleOrig, from, to)...)
	body = append(body, tuple(ctaTupleReply, to, from)...)
	body = append(body, attribute(ctaStatus, binary.BigEndian.AppendUint32(nil, seenReply|assured|confirmed)...)...)
	body = append(body, attribute(ctaTimeout, binary.BigEndian.AppendUint32(nil, 86400)...)...)
	const established = 3
	body = append(body, attribute(ctaProtoInfo|nested, attribute(1|nested, attribute(1, established)...)...)...)
	header := native.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	header = native.AppendUint16(header, ctaNew)
	header = native.AppendUint16(header, unix.NLM_F_REQUEST|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	return append(append(header, make([]byte, 8)...), body...)
}

// fewSources translates what goes to the server to a handful of the router's ports.
func fewSources(p *Part) error {
	first := 40000 + p.random.IntN(10000)
	last := first + 2 + p.draw(6)
	gate := p.distantGate[p.i()]
	if p.draw(2) == 1 {
		kind := []string{"iptables-nft", "iptables-legacy"}[p.draw(2)]
		to := fmt.Sprintf("%s:%d-%d", gate, first, last)
		if p.six {
			to = fmt.Sprintf("[%s]:%d-%d", gate, first, last)
		}
		return p.router.run(p.tables(kind), "-w", "-t", "nat", "-A", "POSTROUTING", "-d", p.to.String(), "-p", "tcp", "-j", "SNAT", "--to-source", to)
	}
	to := fmt.Sprintf("%s:%d-%d", gate, first, last)
	if p.six {
		to = fmt.Sprintf("[%s]:%d-%d", gate, first, last)
	}
	return p.router.feed(fmt.Sprintf("table %s out { chain c { type nat hook postrouting priority 100; %s daddr %s tcp dport %d snat to %s; }; }",
		p.word(), p.word(), p.to, p.port, to), "nft", "-f", "-")
}

// translate puts an address of nobody's before the server, which the router translates.
func (p *Part) translate() error {
	p.service = netip.AddrPortFrom(p.elsewhere(), uint16(1024+p.random.IntN(28000)))
	text := fmt.Sprintf(`table %s services { chain c { type nat hook prerouting priority -100;
		%s daddr %s tcp dport %d dnat to %s; %s daddr %s udp dport %d dnat to %s; }; }`,
		p.word(), p.word(), p.service.Addr(), p.service.Port(), p.local(p.port), p.word(), p.service.Addr(), p.service.Port(), p.local(p.port))
	return errors.Join(
		p.client.route(one(p.service.Addr()), p.nearGate[p.i()], p.client.device, unix.RTN_UNICAST),
		p.router.feed(text, "nft", "-f", "-"))
}

// dropInvalid is the rule about packets that connection tracking cannot make sense of.
func (p *Part) dropInvalid() error {
	front := p.draw(3)
	if front == 0 {
		text := fmt.Sprintf("table %s guard { chain c { type filter hook forward priority 0; ct state invalid counter drop; }; }", p.word())
		return p.router.feed(text, "nft", "-f", "-")
	}
	words := p.tables([]string{"iptables-nft", "iptables-legacy"}[front-1])
	return p.router.run(words, "-w", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
}

// forgotten drops what is invalid, and takes no connection up that it did not see begin.
func forgotten(p *Part) error {
	return errors.Join(p.dropInvalid(), p.router.set("net.netfilter.nf_conntrack_tcp_loose", "0"))
}

// forget opens connections, lets the router forget them, and goes on.
func forget(ctx context.Context, p *Part) {
	afterOne(ctx, p, func(conn net.Conn) {
		p.wrong(p.router.do(func() error { return p.deleteEntries() }))
		p.saw(p.exchange(ctx, conn, 10))
	})
}

// afterOne opens connections, asks for one answer on each, and goes on with those that got it.
func afterOne(ctx context.Context, p *Part, then func(net.Conn)) {
	every(ctx, p.attempts, 50*time.Millisecond, func() {
		conn, err := p.connect(ctx, "tcp")
		if err != nil {
			p.saw(outcomeOf(err, Timeout))
			return
		}
		p.atEnd(func() { conn.Close() })
		if outcome := p.exchange(ctx, conn, 10); outcome != OK {
			p.saw(outcome)
			return
		}
		then(conn)
	})
}

// deleteEntries removes the part's connections from the router's table.
func (p *Part) deleteEntries() error {
	filter := &netlink.ConntrackFilter{}
	if err := filter.AddIP(netlink.ConntrackOrigDstIP, p.to.AsSlice()); err != nil {
		return err
	}
	family := netlink.InetFamily(unix.AF_INET)
	if p.six {
		family = unix.AF_INET6
	}
	_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, filter)
	return err
}

// masqueraded translates the client's address at the router, which forgets a connection
// after a second without a packet, and lets the server speak after two.
func masqueraded(p *Part) error {
	front := p.draw(3)
	all := p.serve(p.server, p.local(p.port), func(conn net.Conn) {
		buffer := make([]byte, 64)
		if n, err := conn.Read(buffer); err == nil {
			conn.Write(buffer[:n])
		}
		for range 20 {
			time.Sleep(2 * time.Second)
			if _, err := conn.Write([]byte("news")); err != nil {
				return
			}
		}
	})
	if front == 0 {
		all = errors.Join(all, p.router.feed(fmt.Sprintf("table %s out { chain c { type nat hook postrouting priority 100; %s daddr %s masquerade; }; }",
			p.word(), p.word(), p.to), "nft", "-f", "-"))
	} else {
		words := p.tables([]string{"iptables-nft", "iptables-legacy"}[front-1])
		all = errors.Join(all, p.router.run(words, "-w", "-t", "nat", "-A", "POSTROUTING", "-d", p.to.String(), "-j", "MASQUERADE"))
	}
	return errors.Join(all, p.router.set("net.netfilter.nf_conntrack_tcp_timeout_established", "1"))
}

// waitForNews keeps connections on which the server is to speak, and does not.
func waitForNews(ctx context.Context, p *Part) {
	afterOne(ctx, p, func(conn net.Conn) {
		stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
		defer stop()
		conn.SetDeadline(time.Now().Add(3 * time.Second))
		_, err := conn.Read(make([]byte, 16))
		p.saw(outcomeOf(err, Hang))
	})
}

var conntrackFaults = []*Fault{
	{Name: "conntrack-full", behind: true, Number: "01", Says: "The table of connection tracking is full: no new connection is let through.", whole: true,
		Causes: []string{"conntrack-table-full"}, Seen: []Outcome{Timeout, Silent}, needs: []string{"iptables-nft", "iptables-legacy", "nft"},
		induce: serving(fill), send: callsOrQuestions},
	{Name: "snat-exhausted", Number: "21", Says: "More connections than the ports that they are translated to.",
		Causes: []string{"snat-ports-exhausted"}, Seen: []Outcome{Timeout}, needs: []string{"nft", "iptables-nft", "iptables-legacy"},
		induce: serving(fewSources), send: hold(20)},
	{Name: "conntrack-invalid", Number: "22", Says: "A rule drops what connection tracking calls invalid: a connection that it forgot.",
		Causes: []string{"conntrack-invalid-drop"}, Seen: []Outcome{Hang}, needs: []string{"nft", "iptables-nft", "iptables-legacy"},
		induce: serving(forgotten), send: forget},
	{Name: "nat-forgotten", Says: "A router that translates forgets connections on which nothing is said for long.", window: 4 * time.Second, whole: true,
		Causes: []string{"connection-forgotten"}, Seen: []Outcome{Hang, Reset}, needs: []string{"nft", "iptables-nft", "iptables-legacy"},
		induce: masqueraded, send: waitForNews},
}
