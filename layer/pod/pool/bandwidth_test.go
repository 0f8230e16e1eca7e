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
