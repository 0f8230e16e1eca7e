package healthcheck

import (
	"net"
	"net/http"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/kernel/netns"
)

// Places say at which addresses of the node checks are answered: kube-proxy's
// nodePortAddresses. The zero value is all of them.
type Places struct {
	// Ranges hold the addresses; a family without a range has all.
	Ranges []netip.Prefix
	// Primary is the node's primary addresses alone.
	Primary bool
}

// Choose says that it matters which addresses a node has.
func (p Places) Choose() bool { return p.Primary || len(p.Ranges) > 0 }

// all says whether a family has all addresses.
func (p Places) all(is6 bool) bool {
	some := false
	for _, one := range p.Ranges {
		if one.Addr().Is6() == is6 {
			some = true
			if one.Bits() == 0 {
				return true
			}
		}
	}
	return !some && !p.Primary
}

// at are the addresses of a family among those that the node has. primary are the
// node's own in the cluster, the first of each family counts.
func (p Places) at(is6 bool, has, primary []netip.Addr) (at []netip.Addr) {
	family := func(a netip.Addr) bool { return a.Is6() == is6 }
	if p.all(is6) {
		if is6 {
			return []netip.Addr{netip.IPv6Unspecified()}
		}
		return []netip.Addr{netip.IPv4Unspecified()}
	}
	if p.Primary {
		if i := slices.IndexFunc(primary, family); i >= 0 && slices.Contains(has, primary[i]) {
			at = append(at, primary[i])
		}
		return at
	}
	for _, one := range has {
		within := func(r netip.Prefix) bool { return r.Contains(one) }
		if family(one) && slices.ContainsFunc(p.Ranges, within) && !slices.Contains(at, one) {
			at = append(at, one)
		}
	}
	return at
}

// Listeners are what answers checks at places. has are the addresses of the node's
// devices, primary its own in the cluster; well says whether the proxy does well.
func (p Places) Listeners(checks []Check, has, primary []netip.Addr, well func() bool) (all []Listener) {
	for _, c := range checks {
		network := "tcp4"
		if c.IPv6 {
			network = "tcp6"
		}
		for _, address := range p.at(c.IPv6, has, primary) {
			all = append(all, Listener{
				Network: network, Address: netip.AddrPortFrom(address, c.Port),
				For: "healthCheckNodePort of " + c.Service.String(), Handler: c.answer(well),
			})
		}
	}
	return all
}

// Addresses are those of the devices in the network namespace at path; the empty
// path is this process's own.
func Addresses(path string) (has []netip.Addr, err error) {
	err = netns.In(path, func() error {
		all, err := net.InterfaceAddrs()
		for _, one := range all {
			if prefix, err := netip.ParsePrefix(one.String()); err == nil {
				has = append(has, prefix.Addr())
			}
		}
		return err
	})
	return has, err
}

// Listener is a place and who answers there.
type Listener struct {
	// Network is tcp4, tcp6, or tcp for both where the address is unspecified.
	Network string
	Address netip.AddrPort
	// For is said in status and log: "healthCheckNodePort of shop/web".
	For     string
	Handler http.Handler
}
