package trace

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer/trace/cause"
)

// mostPaths is how many routes the kernel is asked for in all.
const mostPaths = 2000

// mostAsked is how many namespaces may be for each to be asked about every connection that
// does not come about.
const mostAsked = 32

// question is one look-up of a route.
type question struct {
	space    uint32
	from     string
	src, dst netip.Addr
}

// paths asks the kernel about everything that was dropped or refused, about connections
// that do not come about, there and back, and about where tunnels lead.
func (r *Reader) paths(ctx context.Context, e *cause.Evidence) (all []cause.Path) {
	asked := map[question]bool{}
	of := map[uint32][]question{}
	ask := func(q question) {
		if !q.dst.IsValid() || q.dst.IsUnspecified() || q.dst.IsMulticast() || asked[q] {
			return
		}
		if len(asked) == mostPaths {
			r.note("routes: the kernel is asked for the first %d that matter", mostPaths)
			return
		}
		asked[q] = true
		of[q.space] = append(of[q.space], q)
	}
	for _, event := range e.Events {
		src, dst := event.Tuple.Source.Addr(), event.Tuple.Destination.Addr()
		switch event.Kind {
		case cause.Drop, cause.ICMPSent, cause.ResetSent:
			ask(question{event.Space, event.Device, src, dst})
			ask(question{event.Space, "", netip.Addr{}, src}) // the way back
			ask(question{event.Space, "", netip.Addr{}, dst})
		case cause.CallFailed, cause.SocketError, cause.NeighFailed, cause.Retransmit, cause.StateChange:
			ask(question{event.Space, "", src, dst})
			ask(question{event.Space, "", netip.Addr{}, dst})
		}
		// What did not get through: every namespace on its way is asked about there and back.
		lost := event.Kind == cause.Retransmit || event.Kind == cause.SocketError || event.Reason == "IP_INHDR" ||
			event.Kind == cause.StateChange && event.OldState == tcpSynSent && event.NewState == tcpClose || event.Reason == "NEIGH_FAILED"
		if lost && len(e.Spaces) <= mostAsked {
			for _, s := range e.Spaces {
				ask(question{s.Inode, "", netip.Addr{}, src})
				ask(question{s.Inode, "", netip.Addr{}, dst})
			}
		}
	}
	for _, s := range e.Spaces {
		for _, socket := range s.After.Sockets {
			if socket.Remote.Port() != 0 && (socket.State == tcpSynSent || socket.State == tcpSynReceived || socket.Retransmits > 0) {
				ask(question{s.Inode, "", socket.Local.Addr(), socket.Remote.Addr()})
			}
		}
		for _, l := range s.After.Links {
			if l.VXLAN == nil {
				continue
			}
			ask(question{s.Inode, "", l.VXLAN.Local, l.VXLAN.Group})
			for _, peers := range l.VXLAN.Peers {
				for _, peer := range peers {
					ask(question{s.Inode, "", l.VXLAN.Local, peer})
				}
			}
		}
	}
	for _, s := range e.Spaces {
		if len(of[s.Inode]) == 0 || ctx.Err() != nil {
			continue
		}
		_ = r.inside(s.Inode, func() {
			for _, q := range of[s.Inode] {
				all = append(all, answer(s, q))
			}
		})
	}
	return all
}

// answer is what the kernel says, in the calling thread's namespace.
func answer(s *cause.Space, q question) cause.Path {
	p := cause.Path{Space: q.space, From: q.from, Source: q.src, Destination: q.dst}
	options := &netlink.RouteGetOptions{}
	if q.src.IsValid() && !q.src.IsUnspecified() && q.src.Is4() == q.dst.Is4() {
		options.SrcAddr = q.src.AsSlice()
	}
	for _, l := range s.After.Links {
		if q.from != "" && l.Name == q.from {
			options.IifIndex = l.Index
		}
	}
	found, err := netlink.RouteGetWithOptions(q.dst.AsSlice(), options)
	var errno unix.Errno
	if errors.As(err, &errno) {
		p.Errno = int(errno)
		p.Type, p.Route = refusedBy(s, q.dst, errno)
		return p
	}
	if err != nil || len(found) == 0 {
		return p
	}
	route := found[0]
	p.Type, p.Gateway, p.MTU = typeName(route.Type), addrOf(route.Gw), route.MTU
	if via, ok := route.Via.(*netlink.Via); ok && !p.Gateway.IsValid() {
		p.Gateway = addrOf(via.Addr)
	}
	for _, l := range s.After.Links {
		if l.Index == route.LinkIndex {
			p.Device = l.Name
			if p.MTU == 0 {
				p.MTU = l.MTU
			}
		}
	}
	options.FIBMatch = true
	if matched, err := netlink.RouteGetWithOptions(q.dst.AsSlice(), options); err == nil && len(matched) > 0 {
		p.Route = routeText(matched[0], p)
	}
	return p
}

// refusedBy is the type of a route that refuses with errno, and the route or rule
// itself if it is listed.
func refusedBy(s *cause.Space, dst netip.Addr, errno unix.Errno) (kind, text string) {
	kind = map[unix.Errno]string{unix.EINVAL: "blackhole", unix.EHOSTUNREACH: "unreachable", unix.EACCES: "prohibit"}[errno]
	best := -1
	for _, route := range s.Routes {
		if route.Type != kind || route.To.IsValid() && !route.To.Contains(dst) {
			continue
		}
		if route.Rule && best < 0 {
			text = route.Text
		}
		if !route.Rule && route.To.Bits() > best {
			best, text = route.To.Bits(), route.Text
		}
	}
	if text == "" {
		return "", "" // the kernel refused for another reason
	}
	return kind, text
}

var typeNames = map[int]string{unix.RTN_UNICAST: "unicast", unix.RTN_LOCAL: "local", unix.RTN_BROADCAST: "broadcast", unix.RTN_ANYCAST: "anycast",
	unix.RTN_MULTICAST: "multicast", unix.RTN_BLACKHOLE: "blackhole", unix.RTN_UNREACHABLE: "unreachable", unix.RTN_PROHIBIT: "prohibit"}

func typeName(kind int) string { return typeNames[kind] }

// routeText is the route as ip-route(8) shows it.
func routeText(r netlink.Route, p cause.Path) string {
	family := netlink.FAMILY_V6
	if p.Destination.Is4() {
		family = netlink.FAMILY_V4
	}
	var words []string
	if r.Type != unix.RTN_UNICAST {
		words = append(words, typeName(r.Type))
	}
	words = append(words, shown(destination(family, r.Dst)))
	if p.Gateway.IsValid() {
		words = append(words, "via", p.Gateway.String())
	}
	if p.Device != "" {
		words = append(words, "dev", p.Device)
	}
	return strings.Join(words, " ") + table(r.Table) + metric(r.Priority)
}

// blocking lists the policies of IPsec that let nothing through.
func (r *Reader) blocking(name string) (all []cause.Policy) {
	policies, err := netlink.XfrmPolicyList(netlink.FAMILY_ALL)
	if err != nil {
		return nil // a kernel without IPsec has none
	}
	prefix := func(n *net.IPNet) netip.Prefix {
		if n == nil {
			return netip.Prefix{}
		}
		ones, _ := n.Mask.Size()
		return netip.PrefixFrom(addrOf(n.IP), ones)
	}
	for _, p := range policies {
		if p.Action != netlink.XFRM_POLICY_BLOCK {
			continue
		}
		if len(all) == mostEntries {
			r.note("policies of IPsec in %s that let nothing through: the first %d", name, mostEntries)
			break
		}
		c := cause.Policy{From: prefix(p.Src), To: prefix(p.Dst), Protocol: uint8(p.Proto), Port: uint16(p.DstPort)}
		c.Text = fmt.Sprintf("src %s dst %s", c.From, c.To)
		if p.Proto != 0 {
			c.Text += " proto " + strings.TrimPrefix(p.Proto.String(), "proto-")
		}
		if p.SrcPort != 0 {
			c.Text += fmt.Sprintf(" sport %d", p.SrcPort)
		}
		if p.DstPort != 0 {
			c.Text += fmt.Sprintf(" dport %d", p.DstPort)
		}
		c.Text += " dir " + strings.TrimPrefix(p.Dir.String(), "dir ")
		all = append(all, c)
	}
	return all
}
