RIVALS = ()
