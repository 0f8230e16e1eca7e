package pool

import (
	"strings"
	"testing"
)

// Rates are those that Kubernetes takes, or none.
func TestBandwidthIsInBounds(t *testing.T) {
	for _, row := range []struct {
		asked Bandwidth
		says  string
	}{
		{Bandwidth{}, ""},
		{Bandwidth{IngressRate: 1000, EgressRate: 1e15}, ""},
		{Bandwidth{IngressRate: 999}, "ingressRate is 999 bits a second"},
		{Bandwidth{IngressRate: 1e6, EgressRate: 1e15 + 1}, "egressRate is 1000000000000001 bits a second, and has to be from 1k to 1P"},
	} {
		err := row.asked.Check()
		if (err != nil) != (row.says != "") || err != nil && !strings.Contains(err.Error(), row.says) {
			t.Errorf("%+v: %v, not %q", row.asked, err, row.says)
		}
	}
}

// A person reads it as the annotations have it.
func TestBandwidthIsSaid(t *testing.T) {
	for want, b := range map[string]Bandwidth{
		"":                     {},
		"in 20M, out 1500k":    {IngressRate: 20e6, IngressBurst: 7, EgressRate: 1500e3},
		"out 1P":               {EgressRate: 1e15},
		"in 1001, out 1000001": {IngressRate: 1001, EgressRate: 1000001},
	} {
		if got := b.String(); got != want {
			t.Errorf("%+v is said to be %q, not %q", b, got, want)
		}
	}
}
