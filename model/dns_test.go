package model

import (
	"fmt"
	"net/netip"
	"testing"
)

func TestLabelsOfEndpoints(t *testing.T) {
	for want, e := range map[string]Endpoint{
		"10-244-1-4": {Address: netip.MustParseAddr("10.244.1.4")},
		"fd00--1":    {Address: netip.MustParseAddr("fd00::1")},
		"fd00--0":    {Address: netip.MustParseAddr("fd00::")},
		"db-0":       {Address: netip.MustParseAddr("10.244.1.4"), Hostname: "db-0"},
	} {
		if got := e.Label(); got != want {
			t.Errorf("%+v is %q, not %q", e, got, want)
		}
	}
}

func TestStrangers(t *testing.T) {
	s := &Snapshot{Others: []Name{{"shop", "mesh"}}, Problems: []Problem{
		{Object: "Service shop/bad"}, {Object: "Service shop"}, {Object: "Pod shop/web"}, {Where: "shop.yaml"},
	}}
	if got := fmt.Sprint(s.Strangers()); got != "[shop/mesh shop/bad]" {
		t.Error(got)
	}
	if len(s.Others) != 1 {
		t.Errorf("the Snapshot has changed: %v", s.Others)
	}
}

func TestWhoIsBehindAPort(t *testing.T) {
	for _, row := range []struct {
		backends []Backend
		want     bool
	}{
		{nil, false},
		{[]Backend{{Terminating: true}, {}}, false},
		{[]Backend{{}, {Ready: true}}, true},
		{[]Backend{{Serving: true, Terminating: true}}, true},
	} {
		if got := (ServicePort{Backends: row.backends}).HasEndpoint(); got != row.want {
			t.Errorf("%+v: %v", row.backends, got)
		}
	}
}
