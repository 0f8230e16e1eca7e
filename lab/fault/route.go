package fault

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// elsewhere is an address of a network that the scene does not have.
func (p *Part) elsewhere() netip.Addr {
	p.hosts.Lock()
	defer p.hosts.Unlock()
	for {
		b := []byte{byte(11 + p.random.IntN(80)), byte(p.random.IntN(256)), byte(p.random.IntN(256)), byte(1 + p.random.IntN(250))}
		if p.six {
			b = append([]byte{0x2a, 0x0b, b[0], b[1], b[2], b[3], 0, 0}, 0, 0, 0, 0, 0, b[0], b[1], b[2])
		}
		addr, _ := netip.AddrFromSlice(b)
		if !p.hosts.taken[addr] {
			p.hosts.taken[addr] = true
			return addr
		}
	}
}

// wide is a range around an address, as a route would name it.
func (p *Part) wide(a netip.Addr) netip.Prefix {
	bits := []int{32, 24, 16}[p.draw(3)]
	if p.six {
		bits = []int{128, 64, 48}[p.draw(3)]
	}
	return netip.PrefixFrom(a, bits).Masked()
}

// leadingNowhere is a route of the kind at the router, to the server or to a network
// behind it.
func leadingNowhere(kind int) func(*Part) error {
	return serving(func(p *Part) error {
		if p.draw(2) == 0 {
			return p.router.route(one(p.to), netip.Addr{}, "", kind)
		}
		if p.draw(2) == 1 {
			return p.ruled(kind)
		}
		p.to = p.elsewhere()
		to := p.wide(p.to)
		return errors.Join(p.client.route(to, p.nearGate[p.i()], p.client.device, unix.RTN_UNICAST), p.router.route(to, netip.Addr{}, "", kind))
	})
}

// ruled is a route of a table of its own, which a rule of policy routing leads to.
func (p *Part) ruled(kind int) error {
	table := 100 + p.random.IntN(100)
	rule := netlink.NewRule()
	rule.Dst, rule.Table, rule.Priority = ipNet(one(p.to)), table, 1000+table
	rule.Family = unix.AF_INET
	if p.six {
		rule.Family = unix.AF_INET6
	}
	if err := p.router.net.RuleAdd(rule); err != nil {
		return fmt.Errorf("add rule to %s in %s: %w", p.to, p.router.name, err)
	}
	r := &netlink.Route{Dst: ipNet(one(p.to)), Type: kind, Table: table}
	if err := p.router.net.RouteAdd(r); err != nil {
		return fmt.Errorf("add route to %s in table %d of %s: %w", p.to, table, p.router.name, err)
	}
	return nil
}

// refusingRule is a rule of policy routing at the router that itself lets nothing through.
func refusingRule(action uint8) func(*Part) error {
	return serving(func(p *Part) error {
		rule := netlink.NewRule()
		rule.Type, rule.Priority, rule.Family = action, 1000+p.random.IntN(1000), unix.AF_INET
		if p.six {
			rule.Family = unix.AF_INET6
		}
		if p.draw(2) == 0 {
			rule.Src = ipNet(one(p.from))
		} else {
			rule.Dst = ipNet(one(p.to))
		}
		if err := p.router.net.RuleAdd(rule); err != nil {
			return fmt.Errorf("add rule %s in %s: %w", rule, p.router.name, err)
		}
		return nil
	})
}

// routerKnowsNot: the client sends to a network that the router has no route to.
func routerKnowsNot(p *Part) error {
	p.to = p.elsewhere()
	return p.client.route(p.wide(p.to), p.nearGate[p.i()], p.client.device, unix.RTN_UNICAST)
}

// clientKnowsNot: nothing leads there from the client itself.
func clientKnowsNot(p *Part) error {
	p.to = p.elsewhere()
	p.blame(p.client)
	return nil
}

// serverKnowsNot: the client's address is one that the server has no route to.
func serverKnowsNot(p *Part) error {
	via := p.from
	p.from = p.elsewhere()
	p.blame(p.server)
	all := p.client.addr(p.client.device, one(p.from))
	if p.hop != nil {
		all = errors.Join(all, p.hop.route(one(p.from), via, p.hop.device, unix.RTN_UNICAST))
		via = p.hopGate[p.i()]
	}
	return errors.Join(all, p.router.route(one(p.from), via, p.router.device, unix.RTN_UNICAST))
}

// looped sends a network from the router to the server and back.
func looped(p *Part) error {
	via := p.to
	p.to = p.elsewhere()
	to := p.wide(p.to)
	p.blame(p.router, p.server)
	return errors.Join(
		p.server.set("net.ipv4.ip_forward", "1", "net.ipv6.conf.all.forwarding", "1",
			"net.ipv4.conf.all.send_redirects", "0", "net.ipv4.conf."+p.server.device+".send_redirects", "0"),
		p.client.route(to, p.nearGate[p.i()], p.client.device, unix.RTN_UNICAST),
		p.router.route(to, via, p.router.far, unix.RTN_UNICAST),
		p.server.route(to, p.distantGate[p.i()], p.server.device, unix.RTN_UNICAST))
}

// strict makes the router look where a source would be answered to, which is elsewhere.
func strict(all bool) func(*Part) error {
	return serving(func(p *Part) error {
		p.from = p.elsewhere()
		which, other := p.router.device, "all"
		if all {
			which, other = other, which
		}
		return errors.Join(
			p.router.set("net.ipv4.conf."+other+".rp_filter", "0", "net.ipv4.conf."+which+".rp_filter", "1"),
			// Asked by this source, the router would not even answer ARP.
			p.client.set("net.ipv4.conf.all.arp_announce", "2"),
			p.client.addr(p.client.device, one(p.from)),
			p.router.route(one(p.from), p.to, p.router.far, unix.RTN_UNICAST))
	})
}

// noForwarding makes the router a host.
func noForwarding(p *Part) error {
	if p.six {
		return p.router.set("net.ipv6.conf.all.forwarding", "0")
	}
	return p.router.set("net.ipv4.ip_forward", "0")
}

// martians sends packets that claim to come from 127/8.
func martians(ctx context.Context, p *Part) {
	raw, ok := openRaw(p)
	if !ok {
		return
	}
	defer raw.close()
	from := netip.AddrFrom4([4]byte{127, byte(p.random.IntN(256)), byte(p.random.IntN(256)), byte(2 + p.random.IntN(200))})
	p.blame(p.gate())
	for range 3 * p.attempts {
		p.wrong(raw.send(datagram(netip.AddrPortFrom(from, 5000), p.local(p.port), make([]byte, 32), 0)))
		if !rest(ctx, 30*time.Millisecond) {
			return
		}
	}
}

var routeFaults = []*Fault{
	{Name: "strict-rp-filter", Number: "04", Says: "The router's strict reverse path filter drops a source that it would answer to another way.",
		Causes: []string{"reverse-path-filter"}, Seen: []Outcome{Timeout, Silent}, families: onlyFour, induce: strict(false), send: callsOrQuestions},
	{Name: "rp-filter-all", Says: "The same, by the setting for all devices.",
		Causes: []string{"reverse-path-filter"}, Seen: []Outcome{Timeout, Silent}, families: onlyFour, induce: strict(true), send: callsOrQuestions},
	{Name: "routing-loop", behind: true, Number: "08", Says: "Two routers send a packet to one another until its time to live is over.",
		Causes: []string{"routing-loop"}, Seen: []Outcome{Unreachable, Timeout, Silent}, induce: looped, send: callsOrQuestions},
	{Name: "blackhole-route", behind: true, Number: "11", Says: "A route of type blackhole: nothing comes back, and nothing counts.",
		Causes: []string{"route-blackhole"}, Seen: []Outcome{Timeout, Silent}, induce: leadingNowhere(unix.RTN_BLACKHOLE), send: callsOrQuestions},
	{Name: "unreachable-route", behind: true, Number: "11b", Says: "A route of type unreachable answers with ICMP.",
		Causes: []string{"route-unreachable"}, Seen: []Outcome{Unreachable, NoNetwork, Timeout}, induce: leadingNowhere(unix.RTN_UNREACHABLE), send: calls},
	{Name: "prohibit-route", behind: true, Says: "A route of type prohibit answers as a firewall may.",
		Causes: []string{"route-prohibit"}, Seen: []Outcome{Unreachable, Prohibited, Timeout}, induce: leadingNowhere(unix.RTN_PROHIBIT), send: calls},
	{Name: "unreachable-rule", Says: "A rule of policy routing refuses as unreachable: there is a route, and nobody looks for it.",
		Causes: []string{"route-unreachable"}, Seen: []Outcome{Unreachable, NoNetwork, Timeout}, induce: refusingRule(unix.RTN_UNREACHABLE), send: calls},
	{Name: "blackhole-rule", Says: "A rule of policy routing swallows.",
		Causes: []string{"route-blackhole"}, Seen: []Outcome{Timeout, Silent}, induce: refusingRule(unix.RTN_BLACKHOLE), send: callsOrQuestions},
	{Name: "router-no-route", behind: true, Number: "12", Says: "The router has no route to the destination.",
		Causes: []string{"no-route"}, Seen: []Outcome{NoNetwork, Unreachable, Silent, Timeout}, induce: routerKnowsNot, send: callsOrQuestions},
	{Name: "client-no-route", Number: "12b", Says: "The client itself has no route to the destination: nothing is sent.",
		Causes: []string{"no-route"}, Seen: []Outcome{NoNetwork}, induce: clientKnowsNot, send: callsOrQuestions},
	{Name: "no-route-back", behind: true, Number: "37", Says: "The server has no route to who asks: it never answers.",
		Causes: []string{"no-route-back"}, Seen: []Outcome{Timeout}, induce: serving(serverKnowsNot), send: calls},
	{Name: "forwarding-off", Number: "13", Says: "The router does not forward.", whole: true,
		Causes: []string{"forwarding-off"}, Seen: []Outcome{Timeout, Silent}, induce: serving(noForwarding), send: callsOrQuestions},
	{Name: "martian-source", Number: "23", Says: "Packets claim to come from 127/8.", families: onlyFour,
		Causes: []string{"martian-source"}, induce: serving(), send: martians},
}
