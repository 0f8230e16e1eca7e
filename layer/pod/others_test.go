package pod

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer/pod/cni"
)

// On a node where another plug-in has given pods their network, their addresses are not
// given again as long as they run: neither those that host-local has written down, nor those
// to which a route leads. What is from before the boot counts for nothing.
func TestAddressesOfOthersAreNotGiven(t *testing.T) {
	b := newTown(t)
	b.settings.HostLocal = filepath.Join(t.TempDir(), "networks")
	network := filepath.Join(b.settings.HostLocal, "cbr0")
	must(t, os.MkdirAll(network, 0o755))
	lease := func(name string) string { return filepath.Join(network, name) }
	for _, name := range []string{"10.244.1.1", "fd00:1::1", "10.244.1.4", "last_reserved_ip.0", "lock"} {
		must(t, os.WriteFile(lease(name), []byte("0123456789ab\r\neth0"), 0o644))
	}
	must(t, os.Chtimes(lease("10.244.1.4"), time.Time{}, time.Now().Add(-10*365*24*time.Hour)))
	n, err := link.Open(b.NetNS)
	must(t, err)
	defer n.Close()
	device, err := n.Veth(link.Veth{Name: "vethother", Peer: "eth0", PeerNamespace: b.space("other")})
	must(t, err)
	must(t, n.Up(device))
	must(t, n.Route(link.Route{To: netip.MustParsePrefix("10.244.1.2/32"), Link: device}))
	for _, container := range []string{"web", "db", "five", "six", "seven", "eight"} {
		b.space(container)
	}
	ranges := []string{"10.244.1.0/29", "fd00:1::/64"} // .1 to .6
	l := b.open(ranges...)
	if got := b.add(l, "web"); !slices.Equal(got, []netip.Addr{netip.MustParseAddr("10.244.1.3"), netip.MustParseAddr("fd00:1::2")}) {
		t.Errorf("the first pod was given %v", got)
	}
	if got := b.add(l, "db"); got[0] != netip.MustParseAddr("10.244.1.4") {
		t.Errorf("the address of a pod of before the boot was not given, but %v", got)
	}
	b.add(l, "five")
	b.add(l, "six")
	if _, err := l.Answer(t.Context(), b.request(cni.Add, "seven", "")); code(t, err) != types.ErrTryAgainLater {
		t.Errorf("all addresses are in use, and an ADD says %v", err)
	}
	// The others' pods end: theirs are free.
	must(t, n.Delete("vethother"))
	must(t, os.WriteFile(lease("10.244.1.77"), []byte("another\r\neth0"), 0o644))
	must(t, second(l.Answer(t.Context(), b.request(cni.Del, "0123456789ab", ""))))
	if left, _ := filepath.Glob(lease("*.*.*.*")); !slices.Equal(left, []string{lease("10.244.1.77")}) {
		t.Errorf("of host-local's there are %v", left)
	}
	b.apply(l, ranges...)
	if got := b.add(l, "eight"); got[0] != netip.MustParseAddr("10.244.1.1") {
		t.Errorf("with the others gone a pod is given %v", got)
	}
}
