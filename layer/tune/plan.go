package tune

import (
	"cmp"
	"slices"
	"strconv"
	"time"
)

// The settings; kernel Documentation/networking/nf_conntrack-sysctl.rst.
const (
	conntrack      = "net.netfilter.nf_conntrack_"
	mostTracked    = conntrack + "max"
	buckets        = conntrack + "buckets"
	tcpEstablished = conntrack + "tcp_timeout_established"
	tcpCloseWait   = conntrack + "tcp_timeout_close_wait"
	tcpBeLiberal   = conntrack + "tcp_be_liberal"
	udp            = conntrack + "udp_timeout"
	udpStream      = conntrack + "udp_timeout_stream"
)

const (
	// perCoreMost is what MaxPerCore comes to at most, as in kube-proxy since 1.36
	// (pkg/proxy/conntrack/sysctls.go). Min may be more.
	perCoreMost = 1 << 20
	// chain is how many connections may share a bucket, as in kube-proxy.
	chain = 4
)

// plan is what the settings of the layer ask for.
func plan(s Settings) *Picture {
	p := &Picture{asked: true}
	ask := func(name, field string, value int64, atLeast bool) {
		p.rows = append(p.rows, &Row{Name: name, Value: strconv.FormatInt(value, 10), Owner: field + " of " + s.From, wanted: true, atLeast: atLeast})
	}
	c := s.Conntrack
	if c.MaxPerCore > 0 {
		most, field := min(c.MaxPerCore*int64(s.CPUs), perCoreMost), "conntrack.maxPerCore"
		if most < c.Min {
			most, field = c.Min, "conntrack.min"
		}
		ask(mostTracked, field, most, true)
		ask(buckets, field, most/chain, true)
	}
	for _, timeout := range []struct {
		name, field string
		of          time.Duration
	}{
		{tcpEstablished, "conntrack.tcpEstablishedTimeout", c.TCPEstablished},
		{tcpCloseWait, "conntrack.tcpCloseWaitTimeout", c.TCPCloseWait},
		{udp, "conntrack.udpTimeout", c.UDP},
		{udpStream, "conntrack.udpStreamTimeout", c.UDPStream},
	} {
		if timeout.of > 0 {
			ask(timeout.name, timeout.field, int64(timeout.of/time.Second), false)
		}
	}
	if c.TCPBeLiberal {
		ask(tcpBeLiberal, "conntrack.tcpBeLiberal", 1, false)
	}
	slices.SortFunc(p.rows, func(a, b *Row) int { return cmp.Compare(a.Name, b.Name) })
	return p
}
