package pod

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/pod/pool"
)

// lengths are how long packets of a pod may be, in bytes: by its device, and by its routes.
// The node answers for what is longer than its own routes take; with these a pod need not
// be told, and offers others what it can take (MSS).
type lengths struct {
	device int
	routes map[netip.Prefix]int
}

var everywhere = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}

// mostLengths is how many ranges of other nodes have routes of their own in a pod, of each
// family: with more, the node answers for the rest.
const mostLengths = 32

// leastCover is how many bits a route has at least that is to cover the ranges of many
// nodes: shorter ones would cover what is none of theirs.
func leastCover(a netip.Addr) int {
	if a.Is4() {
		return 8
	}
	return 16
}

// lengths are those of pods, by the ranges of other nodes. The default routes have what
// most ways take, or the way out of the cluster if that is less. Other nodes' ranges have
// routes of their own only where that differs.
func (f facts) lengths(others []netip.Prefix) lengths {
	l := lengths{routes: map[netip.Prefix]int{}}
	for _, all := range everywhere {
		out, there := f.table[all]
		if !there {
			out = f.mtu
		}
		mtus, times := map[netip.Prefix]int{}, map[int]int{}
		for _, to := range others {
			if to.Addr().Is4() == all.Addr().Is4() {
				mtus[to] = f.by(to, out)
				times[mtus[to]]++
			}
		}
		ranges := slices.SortedFunc(maps.Keys(mtus), func(a, b netip.Prefix) int {
			return cmp.Or(cmp.Compare(mtus[a], mtus[b]), a.Compare(b))
		})
		usual, most := out, 0
		for _, to := range ranges { // the smallest first
			if mtu := mtus[to]; times[mtu] > most {
				usual, most = mtu, times[mtu]
			}
		}
		if !there {
			out = usual // nothing leaves the cluster
		}
		l.routes[all] = min(out, usual)
		l.device = max(l.device, out, usual)
		if usual > out {
			for _, cover := range covers(ranges) {
				l.routes[cover] = usual
			}
		}
		ranges = slices.DeleteFunc(ranges, func(to netip.Prefix) bool { return mtus[to] == usual })
		for _, to := range ranges[:min(len(ranges), mostLengths)] {
			l.routes[to], l.device = mtus[to], max(l.device, mtus[to])
		}
	}
	return l
}

// by is how long packets to a range may be, by the node's longest route to it.
func (f facts) by(to netip.Prefix, otherwise int) int {
	for bits := to.Bits(); bits > 0; bits-- {
		if mtu := f.table[netip.PrefixFrom(to.Addr(), bits).Masked()]; mtu > 0 {
			return mtu
		}
	}
	return otherwise
}

// covers are as few ranges as have all the others in them.
func covers(ranges []netip.Prefix) []netip.Prefix {
	if len(ranges) == 0 {
		return nil
	}
	all := ranges[0]
	for _, r := range ranges {
		for all.Bits() > r.Bits() || !all.Contains(r.Addr()) {
			all = netip.PrefixFrom(all.Addr(), all.Bits()-1).Masked()
		}
	}
	if len(ranges) == 1 || all.Bits() >= leastCover(all.Addr()) {
		return []netip.Prefix{all}
	}
	half := netip.PrefixFrom(all.Addr(), all.Bits()+1)
	upper := slices.Clone(ranges)
	lower := slices.DeleteFunc(slices.Clone(ranges), func(r netip.Prefix) bool { return !half.Contains(r.Addr()) })
	upper = slices.DeleteFunc(upper, func(r netip.Prefix) bool { return half.Contains(r.Addr()) })
	return append(covers(lower), covers(upper)...)
}

// of are those of one pod: the routes of its families, and a device that only grows.
func (l lengths) of(pod *Pod) lengths {
	own := lengths{max(l.device, pod.mtu), map[netip.Prefix]int{}}
	for to, mtu := range l.routes {
		if slices.ContainsFunc(pod.Addresses, func(a netip.Addr) bool { return a.Is4() == to.Addr().Is4() }) {
			own.routes[to] = mtu
		}
	}
	return own
}

func (l lengths) equal(o lengths) bool { return l.device == o.device && maps.Equal(l.routes, o.routes) }

func (l lengths) String() string {
	text := []string{fmt.Sprint(l.device)}
	for _, to := range slices.SortedFunc(maps.Keys(l.routes), netip.Prefix.Compare) {
		if l.routes[to] != l.device {
			text = append(text, fmt.Sprintf("%s %d", to, l.routes[to]))
		}
	}
	return strings.Join(text, ", ")
}

// correction is what the routes of a pod are to be. It implements layer.Subject.
type correction struct {
	pod *Pod
	to  lengths
}

// Object implements layer.Subject.
func (c *correction) Object() string { return "mtu of " + c.pod.Object() }

// Detail implements layer.Subject.
func (c *correction) Detail() string { return "-> " + c.to.String() }

// corrections are of pods that run, whose routes are not as new pods' would be.
func corrections(have *Picture, others []netip.Prefix) (all []*correction) {
	wanted := have.facts.lengths(others)
	for _, pod := range have.pods {
		if pod.inside.device == 0 || pod.busy || pod.state == gone {
			continue // it could not be looked at, or is to be looked at later
		}
		to := wanted.of(pod)
		for _, out := range everywhere {
			if _, ours := pod.inside.routes[out]; !ours { // somebody has replaced it
				delete(to.routes, out)
			}
		}
		if !pod.inside.equal(to) {
			all = append(all, &correction{pod, to})
		}
	}
	return all
}

// lookInside says of each pod how long its packets may be. What was set here is known; of
// others their namespaces are looked into, once.
func (l *Layer) lookInside(pods []*Pod) {
	var spaces map[netip.Addr]string
	for _, pod := range pods {
		is, known := l.inside[pod.Key]
		if !known && pod.state != gone && !l.busy[pod.Key] {
			if spaces == nil {
				spaces = l.host.spaces()
			}
			if space := spaces[pod.Addresses[0]]; space != "" {
				is, _ = l.host.inside(pod, space) // it may be ending
			}
			l.inside[pod.Key] = is
		}
		pod.inside = is
	}
}

// lookAgain forgets of which pods nothing could be seen or set, and of those that have gone.
func (l *Layer) lookAgain() {
	clear(l.unset)
	maps.DeleteFunc(l.inside, func(key pool.Key, is lengths) bool {
		_, held := l.pool.Lease(key)
		return is.device == 0 || !held
	})
}

// errInPod says that a pod's own namespace does not let itself be set: a process in it with
// CAP_NET_ADMIN may have altered it, which is no fault of the node.
var errInPod = errors.New("its network namespace does not take them")

// correct sets the routes of one pod right. With errInPod it is left alone until lookAgain.
func (l *Layer) correct(c *correction, spaces func() map[netip.Addr]string) error {
	key := c.pod.Key
	if _, held := l.pool.Lease(key); !held || l.busy[key] {
		return nil // it ended meanwhile, or is about to
	}
	space := spaces()[c.pod.Addresses[0]]
	if space == "" { // likewise, or no process of it is to be seen: nothing is known of it
		c.pod.inside = lengths{}
		l.inside[key] = c.pod.inside
		return nil
	}
	delete(l.inside, key) // until it is known again
	err := l.host.correct(c.pod, space, c.to)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it ended just now
	}
	if errors.Is(err, errInPod) {
		c.pod.inside = lengths{}
		l.inside[key], l.unset[key] = c.pod.inside, fmt.Sprintf("%s keeps the MTUs that it has: %v; if nobody means it to have another network, delete the pod", c.pod.Object(), err)
	}
	if err == nil {
		l.inside[key] = c.to
	}
	return err
}

// spaces implements host.
func (n node) spaces() map[netip.Addr]string {
	found, _ := netns.Spaces(n.netns) // those that may be entered
	paths := map[netip.Addr]string{}
	for _, space := range found {
		for _, addr := range space.Addresses {
			paths[addr] = space.Path
		}
	}
	return paths
}

// inside implements host.
func (n node) inside(pod *Pod, space string) (lengths, error) {
	inner, err := link.Open(space)
	if err != nil {
		return lengths{}, err
	}
	defer inner.Close()
	is, _, err := lengthsIn(inner, pod)
	return is, err
}

// lengthsIn are those in a namespace, and the number of the pod's device there: nothing
// where another has taken its place. Default routes of others are left out.
func lengthsIn(inner *link.Net, pod *Pod) (is lengths, index int, err error) {
	devices, err := inner.Devices()
	if err != nil {
		return is, 0, err
	}
	routes, err := inner.Table()
	at := slices.IndexFunc(devices, func(d link.Device) bool {
		return d.Name == pod.Interface && d.MAC.String() == podMAC(pod.Key).String()
	})
	if err != nil || at < 0 {
		return is, 0, err
	}
	is, index = lengths{devices[at].MTU, map[netip.Prefix]int{}}, devices[at].Index
	for _, r := range routes {
		if r.Link == index && r.Via == gatewayOf(r.To.Addr()) && (r.To.Bits() == 0 || r.Protocol == routeProtocol) {
			is.routes[r.To] = cmp.Or(r.MTU, is.device)
		}
	}
	return is, index, nil
}

// correct implements host: the devices first, or routes would ask for more than they take.
func (n node) correct(pod *Pod, space string, to lengths) error {
	outer, err := link.Open(n.netns)
	if err != nil {
		return err
	}
	defer outer.Close()
	inner, err := link.Open(space)
	if err != nil {
		return err
	}
	defer inner.Close()
	is, index, err := lengthsIn(inner, pod)
	if err != nil || index == 0 {
		return err
	}
	if is.device != to.device {
		if err := widen(outer, inner, pod, index, is.device, to.device); err != nil {
			return err
		}
		if err := outer.SetMTU(pod.Index, to.device); err != nil {
			return err
		}
	}
	err = correctIn(inner, index, is, to)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", errInPod, err)
	}
	return err
}

// correctIn is what of it is in the pod's namespace.
func correctIn(inner *link.Net, index int, is, to lengths) error {
	if is.device != to.device {
		if err := inner.SetMTU(index, to.device); err != nil {
			return err
		}
	}
	if err := setRoutes(inner, index, to); err != nil {
		return err
	}
	for old := range is.routes {
		if _, wanted := to.routes[old]; !wanted {
			if err := inner.DeleteRoute(link.Route{To: old, Via: gatewayOf(old.Addr()), Link: index, Protocol: routeProtocol}); err != nil {
				return err
			}
		}
	}
	return nil
}

// setRoutes makes a pod's routes by the gateway, or makes them others.
func setRoutes(inner *link.Net, index int, to lengths) error {
	for _, r := range slices.SortedFunc(maps.Keys(to.routes), netip.Prefix.Compare) {
		route := link.Route{To: r, Via: gatewayOf(r.Addr()), Link: index, MTU: to.routes[r]}
		if r.Bits() > 0 {
			route.Protocol = routeProtocol // so that it is known as ours
		}
		if err := inner.SetRoute(route); err != nil {
			return err
		}
	}
	return nil
}
