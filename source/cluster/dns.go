package cluster

import (
	"fmt"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/corefile"
)

// IsConfiguration says whether a ConfigMap is one that is read: that of CoreDNS, and that
// of ip-masq-agent.
func IsConfiguration(namespace, name string) bool {
	n := model.Name{Namespace: namespace, Name: name}
	return n == corefile.ConfigMap || n == MasqueradeConfigMap
}

// dns reads the configuration of CoreDNS.
func dns(data map[string]string) *model.DNS {
	text, there := data[corefile.Key]
	if !there {
		return corefile.Unknown(fmt.Sprintf("the ConfigMap %s has no %s", corefile.ConfigMap, corefile.Key))
	}
	return corefile.Read(text)
}

// SetNoDNS says why the configuration of the DNS servers is not known, as long as it is not
// put; "" where nobody has asked for it.
func (c *Cluster) SetNoDNS(why string) {
	c.remarked = c.remarked || c.noDNS != why
	c.noDNS = why
}

// dnsNow is what is known of the DNS servers' configuration.
func (c *Cluster) dnsNow() *model.DNS {
	if o := c.inForce(Key{kindConfigMap.String(), corefile.ConfigMap}); o != nil {
		return o.value.(*model.DNS)
	}
	if c.noDNS != "" {
		return corefile.Unknown(c.noDNS)
	}
	return nil
}
